"""Every kernel of the cache on a GPU: right against XLA, fast against a bfloat16 cache.

`python -m benchmarks gpu` has these tables and tokens a second end to end. `--tiny` runs every line
of it on a CPU, in the interpreter and on toy sizes: its times mean nothing.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from benchmarks.common.report import Section, circumstances, print_section, write_json  # noqa: E402
from benchmarks.common.states import Setting  # noqa: E402
from benchmarks.common.timing import Effort  # noqa: E402
from benchmarks.kernels import attention, correct, correct_event, operations  # noqa: E402
from benchmarks.kernels.compare import Sizes  # noqa: E402
from diffkv_jax.pallas_kernels.dispatch import Kernels  # noqa: E402

# no row is begun later in its section
SECONDS = {"correctness": 120.0, "attention": 90.0, "operations": 60.0}
SHAPES = ((1, 8192), (16, 8192), (64, 8192), (1, 32768), (16, 32768), (64, 32768))  # batch, context
TINY_SIZES = Sizes(
    batch=1, context=128, event_layers=1, prompts=1, chunk=32, observe=16, flush=8, blocks=2
)
Measure = Callable[[float], dict[str, Section]]  # tables, from the seconds that are left


def main(
    only: str = typer.Option(",".join(SECONDS), help="sections to run, with commas"),
    tiny: bool = typer.Option(
        False, help="interpreted, toy sizes, on any machine: a test of this script"
    ),
    json: Path | None = typer.Option(None, help="also write everything here"),  # noqa: B008
    seconds: float = typer.Option(1.0, help="factor on the time budgets of the sections"),
    verbose: bool = typer.Option(False, help="tracebacks of rows that fail"),
) -> None:
    """Correctness and speed of the Triton kernels. The exit status is 1 when a row has failed."""
    names = check_arguments(only, SECONDS, tiny)
    sections = kernel_sections(tiny)
    run({name: sections[name] for name in names}, SECONDS, seconds, json, verbose)


def check_arguments(only: str, sections: Iterable[str], tiny: bool) -> list[str]:
    """The sections to run, in order.

    Raises:
        typer.BadParameter: an unknown section, or no GPU.
    """
    names = [name.strip() for name in only.split(",")]
    if unknown := sorted(set(names) - set(sections)):
        raise typer.BadParameter(
            f"--only {','.join(unknown)}: the sections are {', '.join(sections)}"
        )
    if not tiny and jax.default_backend() != "gpu":
        raise typer.BadParameter(
            f"this needs a GPU and JAX runs on {jax.default_backend()}; "
            f"--tiny runs the script in the interpreter"
        )
    return [name for name in sections if name in names]


def setting_of(tiny: bool) -> Setting:
    """The Triton kernels; with `tiny` one head of 64 channels in the interpreter."""
    if not tiny:
        return Setting(Kernels.resolve("triton"))
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


def kernel_sections(tiny: bool) -> dict[str, Measure]:
    """What measures each section of SECONDS."""
    setting, effort = setting_of(tiny), Effort(2, 0.0, 1) if tiny else Effort()

    def correctness(left: float) -> dict[str, Section]:
        """Every kernel against XLA."""
        table = correct.section(left)
        correct.measure(table, [*correct.jobs(setting), *correct_event.jobs(setting)])
        return {"correctness": table}

    def decode_attention(left: float) -> dict[str, Section]:
        """The card's bandwidth, then decode attention."""
        copied, table = attention.bandwidth_section(left), attention.section(left)
        bandwidth = attention.measure_bandwidth(copied, 1 << (20 if tiny else 31), effort)
        attention.measure(table, setting, ((1, 128),) if tiny else SHAPES, bandwidth, effort)
        return {"bandwidth": copied, "attention": table}

    def others(left: float) -> dict[str, Section]:
        """Triton against XLA."""
        table = operations.section(left)
        operations.measure(table, setting, TINY_SIZES if tiny else Sizes(), effort)
        return {"operations": table}

    return {"correctness": correctness, "attention": decode_attention, "operations": others}


def run(
    sections: Mapping[str, Measure],
    limits: Mapping[str, float],
    factor: float,
    json: Path | None,
    verbose: bool,
) -> None:
    """Measure and print the sections one after the other; each has its `limits` in seconds times
    `factor`, all have their sum. The file is written after every section.

    Raises:
        typer.Exit: with status 1 when a row has failed.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("benchmarks").setLevel(logging.DEBUG if verbose else logging.WARNING)
    ends = time.perf_counter() + sum(limits.values()) * factor
    console = Console(width=170, highlight=False)
    facts = circumstances()
    for name, fact in facts.items():
        console.print(f"[bold]{name}[/] {fact}", soft_wrap=True)
    console.print()
    done: dict[str, Section] = {}
    for name, measure in sections.items():
        tables = measure(min(limits[name] * factor, ends - time.perf_counter()))
        for title, table in tables.items():
            print_section(console, table)
            done[title] = table
        if json is not None:
            write_json(json, facts, done)
    if any(table.failed for table in done.values()):
        raise typer.Exit(1)
