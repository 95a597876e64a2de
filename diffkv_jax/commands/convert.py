"""`diffkv convert`."""

from pathlib import Path
from typing import Annotated

import typer

from diffkv_jax.commands import options
from diffkv_jax.commands.failing import told


@told
def convert(
    model: options.Model,
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    dtype: options.Dtype = "auto",
    revision: Annotated[
        str | None, typer.Option(help="Of a name on the Hub: a branch, tag or commit.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a checkpoint that is already at OUT.")
    ] = False,
) -> None:
    """Convert weights to a checkpoint folder that load_pretrained reads."""
    from diffkv_jax.models.load import convert_pretrained

    convert_pretrained(model, out, dtype, revision=revision, overwrite=overwrite)
    typer.echo(f"wrote {out}")


command = convert
