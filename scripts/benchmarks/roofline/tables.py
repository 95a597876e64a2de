"""The Markdown tables of `benchmarks roofline`."""

import datetime
import subprocess
from dataclasses import dataclass, replace

import jax

from benchmarks.common.report import command_line
from benchmarks.roofline import chips
from benchmarks.roofline.cases import FLUSH, LIVE, MIXES, PLAIN, Setting

GOAL = 1.10
MIXED = MIXES[2]
PLATFORM = {"triton": "cuda", "mosaic_tpu": "tpu"}


@dataclass(frozen=True)
class Line:
    """One operation on one layer, counted. Bytes, FLOPs; `scratch` is what one of its kernels
    leaves for the next (size, traffic).
    """

    setting: Setting
    operation: str
    per_step: float
    shared: bool
    must: float
    moved: float
    scratch: tuple[float, float]
    flops: float
    launches: int
    causes: str
    assumed: str

    def device_bytes(self, chip: chips.Chip) -> float:
        """Bytes from and to device memory, when scratch stays in the cache if it fits and what
        programs share is read once.
        """
        size, traffic = self.scratch
        moved = self.must + traffic if self.shared else self.moved
        return moved - traffic if size <= chip.l2 else moved

    def seconds(self, chip: chips.Chip) -> float:
        """Lower bound."""
        return max(self.device_bytes(chip) / chip.bandwidth, self.flops / chip.bf16_flops)


def megabytes(size: float) -> str:
    """A number of bytes for a table."""
    return f"{size / 1e6:.3g} MB"


def chips_of(implementation: str) -> list[chips.Chip]:
    """The chips that an implementation is made for."""
    return [chip for chip in chips.CHIPS.values() if chip.platform == PLATFORM[implementation]]


def label(s: Setting) -> str:
    """A setting in words."""
    return f"{s.model.name}, {s.context // 1024}k, {s.mix.name}"


def shown(lines: list[Line]) -> list[Line]:
    """Decode attention of every setting, the other operations of one mix."""
    return [x for x in lines if x.operation == "decode attention" or x.setting.mix == MIXED]


def counted_table(lines: list[Line], implementation: str) -> str:
    """Bytes of each operation on one layer."""
    own = chips_of(implementation)
    rows = []
    for x in (x for x in shown(lines) if x.setting.implementation == implementation):
        fits = [chip.name for chip in own if x.scratch[0] <= chip.l2]
        scratch = (
            f"{megabytes(x.scratch[0])}, in L2 of {'/'.join(fits) or 'none'}"
            if x.scratch[0]
            else "none"
        )
        first = own[0]
        times = " / ".join(f"{1e6 * x.seconds(chip):.3g}" for chip in own)
        ratio = (
            f"**{x.moved / x.must:.2f}**" if x.moved / x.must > GOAL else f"{x.moved / x.must:.2f}"
        )
        rows.append(
            (
                *(
                    label(x.setting),
                    x.operation,
                    str(x.launches),
                    megabytes(x.must),
                    megabytes(x.moved),
                    ratio,
                ),
                *(
                    f"{x.device_bytes(first) / x.must:.2f}",
                    scratch,
                    f"{x.flops / x.moved:.3g}",
                    times,
                ),
            )
        )
    head = (
        "setting",
        "operation",
        "launches",
        "must move",
        "moves",
        "ratio",
        f"ratio without scratch in L2 ({own[0].name})",
    )
    return _table(
        (
            *head,
            "scratch",
            "FLOP/byte",
            f"lower bound in us ({' / '.join(chip.name for chip in own)})",
        ),
        rows,
    )


def step_table(lines: list[Line]) -> str:
    """A decode step of all layers against the same step over bf16 pages."""
    rows = []
    for s in dict.fromkeys(x.setting for x in lines if x.setting.mix != PLAIN):
        plain = replace(s, mix=PLAIN)
        ours, theirs = (
            [x for x in lines if x.setting == which and x.per_step] for which in (s, plain)
        )
        if not theirs:
            continue
        own = chips_of(s.implementation)
        moved, moved_plain = (
            s.model.layers * sum(x.moved * x.per_step for x in part) for part in (ours, theirs)
        )
        times = [
            [
                1e3 * s.model.layers * sum(x.seconds(chip) * x.per_step for x in part)
                for part in (ours, theirs)
            ]
            for chip in own
        ]
        launches = (
            s.model.layers * sum(x.launches for x in ours if x.per_step == 1),
            s.model.layers * sum(x.launches for x in ours if x.per_step < 1),
        )
        text = " / ".join(f"{a:.3g} ({b / a:.2f}x)" for a, b in times)
        rows.append(
            (
                s.implementation,
                label(s),
                f"{launches[0]} + {launches[1]}",
                megabytes(moved),
                megabytes(moved_plain),
                text,
            )
        )
    names = {name: " / ".join(chip.name for chip in chips_of(name)) for name in PLATFORM}
    head = (
        "implementation",
        "setting",
        "Pallas launches a step + in an event",
        "moves",
        "bf16 pages move",
    )
    return _table(
        (
            *head,
            f"lower bound in ms (times faster than bf16): {names['triton']}; {names['mosaic_tpu']}",
        ),
        rows,
    )


def causes(lines: list[Line]) -> str:
    """Operands that move too much."""
    rows = []
    for x in shown(lines):
        if x.moved / x.must > GOAL:
            assumed = f" ({x.assumed})" if x.assumed else ""
            rows.append(
                (
                    x.setting.implementation,
                    label(x.setting),
                    x.operation,
                    f"{x.moved / x.must:.2f}",
                    x.causes + assumed,
                )
            )
    return _table(
        (
            "implementation",
            "setting",
            "operation",
            "ratio",
            "operands that move most beyond what they must",
        ),
        rows,
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


NOTE = (
    "Nothing here ran on a GPU or TPU: bytes and FLOPs are counted from the kernels' jaxprs "
    "(benchmarks/roofline/traffic.py), bandwidth and "
    "bf16 rate are those of the datasheets (benchmarks/roofline/chips.py). One layer unless "
    "said, {batch} "
    "requests, {live} recent tokens a "
    "head, all heads alike; one step in {flush} has an event, in which {flush} tokens a head "
    "enter in the mix's proportion, and "
    "where there is a low tier 8 are demoted and 4 dropped. *Must move*: live tokens' payload and "
    "metadata, significance in and "
    "out, window, q, output, page ids, each once; for an event what it has to look at and the "
    "tokens that move. *Moves*: what the "
    "kernels ask of device memory, caches not modelled. FLOPs are those of the dot products as "
    "padded. The lower bound is the "
    "larger of bytes / bandwidth and FLOP / rate; scratch that fits the L2, and what the programs "
    "of a GPU's prefill or column sums "
    "read again, are not charged to memory there. Left out: sectors written in part, XLA's "
    "kernels around, weights and the rest of "
    "the model."
)


def report(lines: list[Line], compiled: list[tuple[str, ...]], missing: list[str]) -> str:
    """The section of docs/results.md."""
    commit, changed = (
        subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()
        for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
    )
    origin = (
        f"{datetime.date.today()}, commit {commit}{' with changes' if changed else ''}, JAX "
        f"{jax.__version__}, `{command_line()}`."
    )
    parts = [
        "## Roofline: modelled, not measured",
        f"{origin} {NOTE.format(batch=lines[0].setting.batch, live=LIVE, flush=FLUSH)}",
        "### A decode step, all layers, against bf16 pages",
        step_table(lines),
        *(
            part
            for name in PLATFORM
            for part in (f"### {name}: one layer", counted_table(lines, name))
        ),
        f"### Ratios above {GOAL:.2f}",
        causes(lines),
        "### Compiled",
    ]
    if missing:
        parts.append(
            f"The compiled part is missing: no module {', '.join(missing)} (CONTRIBUTING.md)."
        )
    if compiled:
        head = (
            "implementation",
            "setting",
            "operation",
            "chip",
            "kernels",
            "temporary",
            "copies of pool or window",
            "XLA kernels around",
        )
        parts.append(_table(head, compiled))
    return "\n\n".join(parts)
