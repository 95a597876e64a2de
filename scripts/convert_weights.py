"""`diffkv convert` from a checkout: python scripts/convert_weights.py SOURCE DEST"""

import typer

from diffkv_jax.commands.convert import convert

app = typer.Typer(add_completion=False)
app.command()(convert)

if __name__ == "__main__":
    app()
