"""The console script `diffkv`: a file a command, each of which imports the library when it runs."""

import sys


def main() -> None:
    """Run what the process's arguments ask for."""
    from diffkv_jax.commands.app import app

    try:
        app(prog_name="diffkv")
    except KeyboardInterrupt:  # before or after a command
        sys.exit(130)
