"""`told`: what goes wrong in a command as one line and an exit code."""

import warnings
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from typing import Any

import typer

tracebacks: ContextVar[bool] = ContextVar("tracebacks", default=False)
BAD, INTERRUPTED = 2, 130


def told(command: Callable[..., None]) -> Callable[..., None]:
    """The command; a bad argument or file ends it with one line on
    stderr and code 2, Ctrl-C with 130.
    """

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # whoever reads has enough
        except (TypeError, ValueError, OSError, ModuleNotFoundError) as error:
            if tracebacks.get():
                raise
            say(f"diffkv: {one_line(error)}")
            raise typer.Exit(BAD) from error

    return run


def say(text: str) -> None:
    """A line on stderr."""
    typer.echo(text, err=True)


def one_line(error: BaseException) -> str:
    """What an error says, its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"diffkv: warning: {' '.join(str(message).split())}")
