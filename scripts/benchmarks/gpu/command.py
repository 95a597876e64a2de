"""Every kernel of the cache on a GPU in one command: right against XLA, fast against a bfloat16
cache, and tokens a second end to end.

`python -m benchmarks gpu --json results.json` takes under 8 minutes on an H100. `--tiny` runs
every line of it on a CPU, in the interpreter and on toy sizes: its times mean nothing.
"""

from pathlib import Path

import typer

from benchmarks.common.report import Section
from benchmarks.gpu import serving
from benchmarks.kernels import command as kernels

# no row is begun later in its section
SECONDS = kernels.SECONDS | {"serving": 130.0}


def main(
    only: str = typer.Option(",".join(SECONDS), help="sections to run, with commas"),
    tiny: bool = typer.Option(
        False, help="interpreted, toy sizes, on any machine: a test of this script"
    ),
    json: Path | None = typer.Option(None, help="also write everything here"),  # noqa: B008
    kv_budget: str = typer.Option("8GiB", help="KV memory of the end-to-end runs"),
    model_scale: str = typer.Option(
        "auto",
        help=f"random model of the end-to-end runs: {', '.join(serving.SCALES)} or auto",
    ),
    gguf: Path | None = typer.Option(None, help="a real model for the end-to-end runs"),  # noqa: B008
    seconds: float = typer.Option(1.0, help="factor on the time budgets of the sections"),
    verbose: bool = typer.Option(False, help="tracebacks of rows that fail"),
) -> None:
    """Correctness and speed of the Triton kernels, and of `generate` with them. The exit status is
    1 when a row has failed.
    """
    if model_scale not in ("auto", *serving.SCALES):
        raise typer.BadParameter(
            f"--model-scale {model_scale} must be auto or one of {', '.join(serving.SCALES)}"
        )
    names = kernels.check_arguments(only, SECONDS, tiny)
    setting = kernels.setting_of(tiny)
    load = serving.Load(budget=kv_budget, scale=model_scale, gguf=gguf)
    load = serving.Load("2MiB", 200, 8, 64) if tiny else load

    def end_to_end(left: float) -> dict[str, Section]:
        table = serving.section(left)
        serving.measure(table, setting, load)
        return {"serving": table}

    sections = kernels.kernel_sections(tiny) | {"serving": end_to_end}
    kernels.run({name: sections[name] for name in names}, SECONDS, seconds, json, verbose)
