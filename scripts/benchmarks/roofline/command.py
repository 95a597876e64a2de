"""Bytes, FLOPs and lower-bound times of the cache's kernels at the shapes of real models: modelled
from jaxprs and compilers, not measured.

`python -m benchmarks roofline` needs the compilers of CONTRIBUTING.md for the compiled
part; without them the counted part is printed alone. `--write docs/results.md` replaces what is
between `<!-- roofline -->` and `<!-- /roofline -->` there.
"""

import itertools
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Annotated

import jax
import typer

from benchmarks.roofline import chips  # first: it sets the environment
from benchmarks.roofline.cases import (
    MIXES,
    MODELS,
    PLAIN,
    SLOTS,
    Case,
    Setting,
    append_case,
    decode_case,
    prefill_case,
    sums_case,
)
from benchmarks.roofline.event import event_cases
from benchmarks.roofline.tables import MIXED, PLATFORM, Line, chips_of, label, megabytes, report
from benchmarks.roofline.traffic import Traffic, count_traffic

BATCH = 16
MARKERS = ("<!-- roofline -->", "<!-- /roofline -->")
COMPILED_LAYERS = 8  # a pool that fits every chip


def cases_of(setting: Setting) -> list[Case]:
    """The operations of a setting."""
    cases = [decode_case(setting), append_case(setting), *event_cases(setting)]
    if setting.context <= 8192:
        cases.append(prefill_case(setting))
        cases += [sums_case(setting)] if setting.mix.scored else []
    return cases


def settings() -> list[Setting]:
    """What is counted: Llama at 8k with every mix and at 32k with two of them, SmolLM2 at 8k with
    two.
    """
    chosen = [(MODELS[0], 8192, mix) for mix in MIXES]
    chosen += [
        (model, context, mix)
        for model, context in ((MODELS[0], 32768), (MODELS[1], 8192))
        for mix in (MIXED, PLAIN)
    ]
    return [
        Setting(model, mix, context, BATCH, name)
        for name in PLATFORM
        for model, context, mix in chosen
    ]


def count_lines(setting: Setting) -> list[Line]:
    """Count every operation of a setting."""
    times = 1
    # walked whole, so with one request that stands for all
    if setting.implementation == "mosaic_tpu":
        times, setting = setting.batch, replace(setting, batch=1)

    def sample(kernel: str, grid: tuple[int, ...]) -> Iterable[tuple[tuple[int, ...], float]]:
        """All heads hold the same: the first stands for all. Four blocks of a prompt's rows stand
        for theirs.
        """
        axes = [[(i, 1.0) for i in range(n)] for n in grid]
        if setting.heads in grid:
            axes[grid.index(setting.heads)] = [(0, float(setting.heads))]
        if kernel == "prefill_attention" and grid[1] % 4 == 0 and grid[1] > 4:
            each = grid[1] // 4
            axes[1] = [(i * each + each // 2, float(each)) for i in range(4)]
        for point in itertools.product(*axes):
            yield tuple(i for i, _ in point), prod(weight for _, weight in point)

    lines = []
    for case in cases_of(setting):
        try:
            counted = count_traffic(case.function, *case.arguments, sample=sample)
        except (
            ImportError,
            NotImplementedError,
        ) as error:  # an operation that this implementation lacks
            print(f"left out: {setting.implementation} {case.operation}: {error}", file=sys.stderr)
            continue
        lines.append(_line(replace(setting, batch=BATCH), case, counted, times))
    return lines


def _line(setting: Setting, case: Case, counted: Traffic, times: int) -> Line:
    operands, scratch = counted.operands(), counted.scratch()
    by_xla = sum(read for name, (read, _) in scratch.items() if not operands[name][0])
    excess = {name: sum(pair) - case.must.get(name, 0.0) for name, pair in operands.items()}
    # "output" and the like in `must`
    ours = counted.results - case.must.keys() if case.must.keys() & operands.keys() else set()
    causes = [n for n in excess if excess[n] > 0.01 * case.must_bytes and n not in ours]
    causes.sort(key=lambda n: -excess[n])
    needed = {n: f" for {megabytes(times * case.must[n])}" for n in causes if n in case.must}
    text = ", ".join(
        f"{n} {megabytes(times * sum(operands[n]))}{needed.get(n, '')}" for n in causes[:4]
    )
    return Line(
        setting=setting,
        operation=case.operation,
        per_step=case.per_step,
        shared=setting.implementation == "triton"
        and case.operation in ("prefill chunk", "column sums"),
        must=times * case.must_bytes,
        moved=times * (counted.bytes + by_xla),
        scratch=(
            times * sum(written for _, written in scratch.values()),
            times * sum(map(sum, scratch.values())),
        ),
        flops=times * counted.flops,
        launches=len(counted.kernels),
        causes=text,
        assumed="; ".join(sorted(counted.assumed)),
    )


def compiled_rows(work: tuple[Setting, tuple[str, ...], bool]) -> list[tuple[str, ...]]:
    """Compile the operations of a setting (all, or decode attention alone) for some chips: what the
    kernels take, copies of the pool.
    """
    setting, names, every = work
    setting = replace(setting, model=replace(setting.model, layers=COMPILED_LAYERS))
    # operations give back only what they change
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    rows = []
    for case in cases_of(setting) if every else [decode_case(setting)]:
        for name in names:
            where = (setting.implementation, label(setting), case.operation, name)
            try:
                compiled = chips.compile_for(
                    chips.CHIPS[name], case.function, *case.arguments, donate=case.donated
                )
            except Exception as error:  # a compiler's refusal is a result
                rows.append(
                    (*where, f"**refused**: {str(error).splitlines()[0][:120]}", "", "", "")
                )
                continue
            taken = [
                f"{k}: {r.registers} registers, {r.spill_stores + r.spill_loads} B spilled, "
                f"{r.shared + r.dynamic_shared} B shared"
                for k, r in compiled.kernels.items()
                if "fusion" not in k and not k.startswith("wrapped_")  # XLA's own
            ]
            copies, around = pool_copies(compiled.hlo, case)
            memory = compiled.memory
            temporary = memory.temp_size_in_bytes if memory else 0
            rows.append(
                (
                    *where,
                    "; ".join(taken) or "compiled",
                    megabytes(temporary),
                    ", ".join(copies) or "none",
                    str(around),
                )
            )
    return rows


def pool_copies(hlo: str, case: Case) -> tuple[list[str], int]:
    """Instructions that write a whole array of the pool or of the windows, and how many XLA kernels
    run around the Pallas calls.
    """
    arrays = jax.tree_util.tree_flatten_with_path(case.arguments)[0]
    of_pool = re.compile(r"\.(payload|meta|significance|position)$")
    shapes = {
        x.shape
        for path, x in arrays
        if of_pool.search(jax.tree_util.keystr(path)) or (x.ndim == 4 and x.shape[2] == SLOTS)
    }
    shapes = {shape for shape in shapes if len(shape) > 2 and prod(shape)}
    harmless = {
        "parameter",
        "custom-call",
        "get-tuple-element",
        "bitcast",
        "tuple",
        "opt-barrier",
        "copy-done",
    }
    copies, around, fused = [], 0, False
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            fused = "fused" in line.split("(")[0]
        match = re.match(r"\s+(?:ROOT )?%(\S+) = \(?(\w+)\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if match is None or fused:
            continue
        around += match[4] in ("fusion", "copy", "copy-start", "sort", "scatter", "while")
        if match[4] not in harmless and tuple(int(n) for n in match[3].split(",") if n) in shapes:
            copies.append(f"{match[4]} {match[2]}[{match[3]}]")
    return copies, around


def main(
    write: Annotated[
        Path | None, typer.Option(help="Markdown file whose marked section is replaced")
    ] = None,
    processes: Annotated[int, typer.Option(help="that count and compile side by side")] = 2,
) -> None:
    """Print bytes, FLOPs and lower-bound times of the kernels on chips that are not here."""
    missing = [
        module for platform in PLATFORM.values() for module in chips.missing_packages(platform)
    ]
    work = []
    for name, platform in PLATFORM.items():
        if not chips.missing_packages(platform):
            everywhere = tuple(chip.name for chip in chips_of(name))
            first = Setting(MODELS[0], MIXED, 8192, BATCH, name)
            work += [(first, everywhere[:1], True), (first, everywhere[1:], False)]
            work += [
                (replace(first, model=MODELS[1]), everywhere[:1], False),
                (replace(first, mix=PLAIN), everywhere[:1], False),
            ]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        counting = [pool.submit(count_lines, setting) for setting in settings()]
        compiling = [pool.submit(compiled_rows, part) for part in work]
        lines = [line for job in counting for line in job.result()]
        compiled = [row for job in compiling for row in job.result()]
    text = report(lines, compiled, missing)
    print(text)
    if write is not None:
        before, _, rest = write.read_text().partition(MARKERS[0])
        _, marker, after = rest.partition(MARKERS[1])
        if not marker:
            raise typer.BadParameter(f"{write} needs the lines {MARKERS[0]} and {MARKERS[1]}")
        write.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}")
