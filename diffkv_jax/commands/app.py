"""The commands and what they share: version, tracebacks."""

from typing import Annotated

import typer

from diffkv_jax.commands import bench, chat, convert, evaluate, generate, inspect, serve
from diffkv_jax.commands.failing import tracebacks

app = typer.Typer(
    name="diffkv",
    help="Language models with a compressed KV cache: text, chat, a server, measurements.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _module in (generate, chat, serve, bench, inspect, convert):
    app.command()(_module.command)
evaluate.add_to(app)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"diffkv {version('diffkv-jax')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", envvar="DIFFKV_DEBUG", help="Errors with their tracebacks."),
    ] = False,
) -> None:
    tracebacks.set(debug)
