"""Every kernel of the cache on a GPU in one command: right against XLA, fast against a bfloat16
cache, and tokens a second end to end.

`python scripts/bench_gpu.py --json results.json` takes under 8 minutes on an H100. `--tiny` runs
every line of it on a CPU, in the interpreter and on toy sizes: its times mean nothing.
"""

import logging
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in (".",)]
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402

import bench_attention  # noqa: E402
import bench_correct  # noqa: E402
import bench_correct_event  # noqa: E402
import bench_operations  # noqa: E402
import bench_serving  # noqa: E402
from bench_compare import Sizes  # noqa: E402
from bench_report import Section, circumstances, print_section, write_json  # noqa: E402
from bench_states import Setting  # noqa: E402
from bench_timing import Effort  # noqa: E402
from diffkv_jax.pallas_kernels.dispatch import Kernels  # noqa: E402

# no row is begun later in its section
SECONDS = {"correctness": 120.0, "attention": 90.0, "operations": 60.0, "serving": 130.0}
SHAPES = ((1, 8192), (16, 8192), (64, 8192), (1, 32768), (16, 32768), (64, 32768))  # batch, context
TINY_SIZES = Sizes(
    batch=1, context=128, event_layers=1, prompts=1, chunk=32, observe=16, flush=8, blocks=2
)


def main(
    only: str = typer.Option(",".join(SECONDS), help="sections to run, with commas"),
    tiny: bool = typer.Option(
        False, help="interpreted, toy sizes, on any machine: a test of this script"
    ),
    json: Path | None = typer.Option(None, help="also write everything here"),  # noqa: B008
    kv_budget: str = typer.Option("8GiB", help="KV memory of the end-to-end runs"),
    model_scale: str = typer.Option(
        "auto",
        help=f"random model of the end-to-end runs: {', '.join(bench_serving.SCALES)} or auto",
    ),
    gguf: Path | None = typer.Option(None, help="a real model for the end-to-end runs"),  # noqa: B008
    seconds: float = typer.Option(1.0, help="factor on the time budgets of the sections"),
    verbose: bool = typer.Option(False, help="tracebacks of rows that fail"),
) -> None:
    """Correctness and speed of the Triton kernels. The exit status is 1 when a row has failed."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("bench_gpu").setLevel(logging.DEBUG if verbose else logging.WARNING)
    began = time.perf_counter()
    names = check_arguments(only, model_scale, tiny)
    setting, effort = (
        (tiny_setting(), Effort(2, 0.0, 1))
        if tiny
        else (Setting(Kernels.resolve("triton")), Effort())
    )
    load = bench_serving.Load(budget=kv_budget, scale=model_scale, gguf=gguf)
    load = bench_serving.Load("2MiB", 200, 8, 64) if tiny else load
    console = Console(width=170, highlight=False)
    facts = circumstances()
    for name, fact in facts.items():
        console.print(f"[bold]{name}[/] {fact}", soft_wrap=True)
    console.print()
    done: dict[str, Section] = {}
    for name in names:
        runner = {"correctness": correctness, "attention": attention, "operations": operations}.get(
            name
        )
        left = min(
            SECONDS[name] * seconds, began + sum(SECONDS.values()) * seconds - time.perf_counter()
        )
        tables = runner(setting, effort, left) if runner else serving(setting, load, left)
        for title, table in tables.items():
            print_section(console, table)
            done[title] = table
        if json is not None:
            write_json(json, facts, done)
    if any(table.failed for table in done.values()):
        raise typer.Exit(1)


def check_arguments(only: str, model_scale: str, tiny: bool) -> list[str]:
    """The sections to run, in order.

    Raises:
        typer.BadParameter: an unknown section or scale, or no GPU.
    """
    names = [name.strip() for name in only.split(",")]
    if unknown := sorted(set(names) - set(SECONDS)):
        raise typer.BadParameter(
            f"--only {','.join(unknown)}: the sections are {', '.join(SECONDS)}"
        )
    if model_scale not in ("auto", *bench_serving.SCALES):
        raise typer.BadParameter(
            f"--model-scale {model_scale} must be auto or one of {', '.join(bench_serving.SCALES)}"
        )
    if not tiny and jax.default_backend() != "gpu":
        raise typer.BadParameter(
            f"this needs a GPU and JAX runs on {jax.default_backend()}; "
            f"--tiny runs the script in the interpreter"
        )
    return [name for name in SECONDS if name in names]


def tiny_setting() -> Setting:
    """One head of 64 channels in the interpreter."""
    return Setting(
        Kernels("triton", True),
        1,
        3,
        64,
        slots=24,
        recent=20,
        cold_bytes=1,
        most_layers=1,
        tiny=True,
    )


def correctness(setting: Setting, effort: Effort, seconds: float) -> dict[str, Section]:
    """Every kernel against XLA."""
    del effort
    table = bench_correct.section(seconds)
    bench_correct.measure(table, [*bench_correct.jobs(setting), *bench_correct_event.jobs(setting)])
    return {"correctness": table}


def attention(setting: Setting, effort: Effort, seconds: float) -> dict[str, Section]:
    """The card's bandwidth, then decode attention."""
    copied, table = bench_attention.bandwidth_section(seconds), bench_attention.section(seconds)
    bandwidth = bench_attention.measure_bandwidth(copied, 1 << (20 if setting.tiny else 31), effort)
    bench_attention.measure(
        table, setting, ((1, 128),) if setting.tiny else SHAPES, bandwidth, effort
    )
    return {"bandwidth": copied, "attention": table}


def operations(setting: Setting, effort: Effort, seconds: float) -> dict[str, Section]:
    """Triton against XLA."""
    table = bench_operations.section(seconds)
    bench_operations.measure(table, setting, TINY_SIZES if setting.tiny else Sizes(), effort)
    return {"operations": table}


def serving(setting: Setting, load: bench_serving.Load, seconds: float) -> dict[str, Section]:
    """End to end."""
    table = bench_serving.section(seconds)
    bench_serving.measure(table, setting, load)
    return {"serving": table}


if __name__ == "__main__":
    typer.run(main)
