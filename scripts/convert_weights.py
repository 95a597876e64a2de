"""Convert Hugging Face safetensors or a GGUF file to a checkpoint folder: python
scripts/convert_weights.py SOURCE DEST
"""

from pathlib import Path
from typing import Annotated

import typer

from diffkv_jax.models.load import convert_pretrained

app = typer.Typer(add_completion=False)


@app.command()
def main(
    source: Annotated[
        str,
        typer.Argument(help="A folder of safetensors, a .gguf file, or a name on the Hub."),
    ],
    dest: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: the file's own.")
    ] = "auto",
    revision: Annotated[
        str | None, typer.Option(help="Of a name on the Hub: a branch, tag or commit.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is already at DEST.")
    ] = False,
) -> None:
    """Convert weights to a checkpoint folder that load_pretrained reads."""
    try:
        convert_pretrained(source, dest, dtype, revision=revision, overwrite=overwrite)
    except (ValueError, ModuleNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"wrote {dest}")


if __name__ == "__main__":
    app()
