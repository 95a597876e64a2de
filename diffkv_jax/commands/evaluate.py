"""`diffkv evaluate`: the command line of `diffkv_jax.evaluation`, which reads its own options."""

import typer

from diffkv_jax.commands.failing import told


@told
def evaluate(context: typer.Context) -> None:
    """What policies cost a model; `diffkv evaluate --help` says what it takes."""
    from diffkv_jax.evaluation.command import main

    if code := main(context.args):
        raise typer.Exit(code)


def add_to(app: typer.Typer) -> None:
    """With all arguments passed on as they are, --help too."""
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(add_help_option=False, context_settings={**passed_on, "help_option_names": []})(
        evaluate
    )
