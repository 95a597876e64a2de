"""The command line of the benchmarks: `python -m benchmarks COMMAND --help`."""

from importlib import import_module

import typer
from typer.core import TyperGroup

COMMANDS = {
    "kernels": "benchmarks.kernels.command",
    "gpu": "benchmarks.gpu.command",
    "peers": "benchmarks.peers.command",
    "methods": "benchmarks.methods.compare",
    "quality": "benchmarks.methods.quality",
    "needle": "benchmarks.methods.needle",
    "paper": "benchmarks.paper.command",
    "serving": "benchmarks.serving.command",
    "serving-on-paper": "benchmarks.serving.on_paper",
    "roofline": "benchmarks.roofline.command",
}


class Commands(TyperGroup):
    """Imports a command's module when it is asked for: they set different environments for JAX."""

    def list_commands(self, ctx) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name: str):
        if cmd_name not in COMMANDS:
            return None
        command = typer.Typer(add_completion=False)
        command.command(cmd_name)(import_module(COMMANDS[cmd_name]).main)
        return typer.main.get_command(command)


app = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Measure the library: each command prints its tables, and says by --help what it needs."""


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
