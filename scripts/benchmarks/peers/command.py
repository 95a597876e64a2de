"""The benchmark against what people use today, on a CPU: transformers, kvpress and llama.cpp beside
diffkv_jax, in turns, in one run.

`make benchmark` runs all of it, which takes hours. Parts add up in one file:

    python -m benchmarks peers --only decode --contexts 2048 --batches 1,8 --out results.json \
        --systems 'ours-*,transformers-bf16'
    python -m benchmarks peers --only report --out results.json --plots plots

Every system has a process of its own with the same threads, model and prompts. A round gives one
sample a system; ratios are of one round. Decoding starts from copies of one prefilled request. A
system that is not installed or fails has a row with the reason.
"""

import datetime
import importlib.metadata
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import typer

from benchmarks.common.report import circumstances
from benchmarks.common.smollm2 import smollm2_gguf
from benchmarks.peers import attention
from benchmarks.peers.grid import PROMPT_TEXT, Run, budget, decode, prefill, quality_section
from benchmarks.peers.plots import write_all as write_plots
from benchmarks.peers.results import SECTIONS, Results, table
from benchmarks.peers.systems import SYSTEMS, chosen
from benchmarks.peers.weights import write_all as write_weights
from benchmarks.peers.worker import Worker
from diffkv_jax.models.gguf_source import GGUFSource
from diffkv_jax.testing.texts import TEXTS, text_tokens

PACKAGES = ("jax", "torch", "transformers", "kvpress", "optimum-quanto", "hqq", "llama-cpp-python")
BASELINES = ("transformers-bf16", "ours-full", *attention.BASELINES)
WORK = Path(tempfile.gettempdir()) / "diffkv-benchmark"
QUICK: dict[str, Any] = {"contexts": [96], "batches": [1, 2], "rounds": 1, "steps": 4}
FEWEST, LONGEST = 65, 8192  # the shortest prompt that every press takes; the model's context


def main(
    only: str = typer.Option(
        ",".join(SECTIONS), help="sections with commas; 'report' measures nothing"
    ),
    systems: str = typer.Option("*", help=f"patterns with commas, of {', '.join(SYSTEMS)}"),
    contexts: str = typer.Option(
        "512,2048,8064", help="prompt tokens; the model takes 8192 with those that follow"
    ),
    batches: str = typer.Option("1,8", help="requests"),
    rounds: int = typer.Option(5, help="samples of each system, after one that warms up"),
    steps: int = typer.Option(32, help="tokens decoded, or fed by the section quality"),
    texts: str = typer.Option(
        "king_james", help=f"texts of the section quality, of {', '.join(TEXTS)}"
    ),
    budgets: str = typer.Option("256,512,1024", help="KV memories of the section budget, MiB"),
    minutes: float = typer.Option(1e9, help="begin no cell later than this"),
    threads: int = typer.Option(0, help="of each system; 0 takes every processor"),
    quick: bool = typer.Option(
        False, help="a tiny grid: a test of this script, its times mean nothing"
    ),
    baselines: str = typer.Option(",".join(BASELINES), help="systems that ratios are taken to"),
    out: Path | None = typer.Option(None, help="JSON file that results are added to"),  # noqa: B008
    plots: Path | None = typer.Option(None, help="folder for plots of everything in the file"),  # noqa: B008
    work: Path = typer.Option(WORK, help="folder for converted weights and logs"),  # noqa: B008
) -> None:
    """Measure beside transformers, kvpress and llama.cpp on the CPU, add to the file, print every
    table of the file.
    """
    sections, names = check_sections(only), check_systems(systems)
    results, name = Results(out), datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    threads = threads or len(processors())
    grid = (
        QUICK
        if quick
        else {
            "contexts": numbers(contexts),
            "batches": numbers(batches),
            "rounds": rounds,
            "steps": steps,
        }
    )
    check_lengths(grid["contexts"], grid["steps"])
    if sections:
        results.runs[name] = facts(threads)
        deadline = time.monotonic() + 60 * minutes
        if grid_sections := [section for section in sections if section != "attention"]:
            run = make_run(name, results, names, texts.split(","), grid, work, threads, deadline)
            measure(run, grid_sections, numbers(budgets))
        if "attention" in sections:
            measure_attention(results, name, quick, grid["rounds"], threads)
        results.runs[name]["load at the end"] = load()
        results.save()
    show(results, baselines.split(","), plots)


def processors() -> list[int]:
    """The numbers of those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def check_sections(only: str) -> list[str]:
    """The sections to measure; none for "report".

    Raises:
        typer.BadParameter: an unknown one.
    """
    names = [name.strip() for name in only.split(",")]
    if unknown := sorted(set(names) - {*SECTIONS, "report"}):
        raise typer.BadParameter(
            f"--only {','.join(unknown)}: the sections are {', '.join(SECTIONS)} and report"
        )
    return [section for section in SECTIONS if section in names]


def check_systems(patterns: str) -> list[str]:
    """The systems that match.

    Raises:
        typer.BadParameter: a pattern that matches none.
    """
    try:
        return chosen(patterns)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def check_lengths(contexts: list[int], steps: int) -> None:
    """Refuse what the model or a peer cannot take.

    Raises:
        typer.BadParameter: names the limits.
    """
    for context in contexts:
        if not FEWEST <= context <= LONGEST - steps:
            raise typer.BadParameter(
                f"--contexts {context} must be at least {FEWEST} and leave "
                f"room for --steps {steps} of {LONGEST}"
            )


def numbers(text: str) -> list[int]:
    """Integers with commas, ascending."""
    return sorted(int(part) for part in text.split(","))


def make_run(
    name: str,
    results: Results,
    systems: list[str],
    texts: list[str],
    grid: dict,
    work: Path,
    threads: int,
    deadline: float,
):
    """Convert the weights, read the texts; no process is started yet."""
    work.mkdir(parents=True, exist_ok=True)
    gguf = smollm2_gguf()
    write_weights(gguf, work)
    names = list(dict.fromkeys([PROMPT_TEXT, *texts]))
    tokens = text_tokens(
        GGUFSource(gguf).tokenizer(), names, max(grid["contexts"]) + grid["steps"] + 1
    )
    by_name: dict[str, np.ndarray] = dict(zip(names, tokens, strict=True))
    return Run(
        name,
        results,
        lambda system: Worker(system, gguf, work, threads),
        systems,
        by_name,
        texts,
        **grid,
        work=work,
        deadline=deadline,
    )


def measure(run: Run, sections: list[str], budgets: list[int]) -> None:
    """The sections that need workers."""
    try:
        run.open()
        if "decode" in sections:
            decode(run)
        if "prefill" in sections:
            prefill(run)
        if "quality" in sections:
            quality_section(run)
        if "budget" in sections:
            budget(run, budgets)
    finally:
        run.close()


def measure_attention(results: Results, name: str, quick: bool, rounds: int, threads: int) -> None:
    """The section attention, in this process and from here on on its first processors."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, processors()[:threads])
    batch, context = (1, 256) if quick else (8, 8192)
    attention.measure(results, name, batch, context, rounds, threads)


def show(results: Results, baselines: list[str], plots: Path | None) -> None:
    """Print every table of the file, and write plots where a folder is given."""
    titles = {key: one.title for key, one in SYSTEMS.items()}
    for section in SECTIONS:
        if text := table(results, section, titles, baselines):
            print(f"\n{text}")
    if plots is not None:
        print(*write_plots(results, titles, plots))


def facts(threads: int) -> dict[str, str]:
    """What a reader needs to know about a run."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        "unknown",
    )
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    return circumstances() | {
        "processor": model,
        "threads": str(threads),
        "packages": versions,
        "load at the start": load(),
    }


def load() -> str:
    """The machine's load averages: of 1, 5 and 15 minutes."""
    return (
        ", ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
