"""XX"""


@dataclass(frozen=True)
class Line:
    """One operation on one layer, counted. Bytes, FLOPs; `scratch` is what one of its kernels leaves for the next (size, traffic)."""

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
        """Bytes from and to device memory, when scratch stays in the cache if it fits and what programs share is read once."""
        size, traffic = self.scratch
        moved = self.must + traffic if self.shared else self.moved
        return moved - traffic if size <= chip.l2 else moved

    def seconds(self, chip: chips.Chip) -> float:
        """Lower bound."""
        return max(self.device_bytes(chip) / chip.bandwidth, self.flops / chip.bf16_flops)


def _mb(size: float) -> str:
    return f"{size / 1e6:.3g} MB"


def _chips(implementation: str) -> list[chips.Chip]:
    return [chip for chip in chips.CHIPS.values() if chip.platform == PLATFORM[implementation]]


def _where(s: Setting) -> str:
    return f"{s.model.name}, {s.context // 1024}k, {s.mix.name}"


def counted_table(lines: list[Line], implementation: str) -> str:
    """Bytes of each operation on one layer."""
    own = _chips(implementation)
    rows = []
    for x in (x for x in lines if x.setting.implementation == implementation):
        fits = [chip.name for chip in own if x.scratch[0] <= chip.l2]
        scratch = f"{_mb(x.scratch[0])}, in L2 of {'/'.join(fits) or 'none'}" if x.scratch[0] else "none"
        first = own[0]
        times = " / ".join(f"{1e6 * x.seconds(chip):.3g}" for chip in own)
        ratio = f"**{x.moved / x.must:.2f}**" if x.moved / x.must > GOAL else f"{x.moved / x.must:.2f}"
        rows.append(
            (
                *(_where(x.setting), x.operation, str(x.launches), _mb(x.must), _mb(x.moved), ratio),
                *(f"{x.device_bytes(first) / x.must:.2f}", scratch, f"{x.flops / x.moved:.3g}", times),
            )
        )
    head = ("setting", "operation", "launches", "must move", "moves", "ratio", f"ratio without scratch in L2 ({own[0].name})")
    return _table((*head, "scratch", "FLOP/byte", f"lower bound in us ({' / '.join(chip.name for chip in own)})"), rows)


def step_table(lines: list[Line]) -> str:
    """A decode step of all layers against the same step over bf16 pages."""
    rows = []
    for s in dict.fromkeys(x.setting for x in lines if x.setting.mix != PLAIN):
        plain = replace(s, mix=PLAIN)
        ours, theirs = ([x for x in lines if x.setting == which and x.per_step] for which in (s, plain))
        if not theirs:
            continue
        own = _chips(s.implementation)
        moved, moved_plain = (s.model.layers * sum(x.moved * x.per_step for x in part) for part in (ours, theirs))
        times = [[1e3 * s.model.layers * sum(x.seconds(chip) * x.per_step for x in part) for part in (ours, theirs)] for chip in own]
        launches = (
            s.model.layers * sum(x.launches for x in ours if x.per_step == 1),
            s.model.layers * sum(x.launches for x in ours if x.per_step < 1),
        )
        text = " / ".join(f"{a:.3g} ({b / a:.2f}x)" for a, b in times)
        rows.append((s.implementation, _where(s), f"{launches[0]} + {launches[1]}", _mb(moved), _mb(moved_plain), text))
    names = {name: " / ".join(chip.name for chip in _chips(name)) for name in PLATFORM}
    head = ("implementation", "setting", f"launches + each {FLUSH}th step", "moves", "bf16 pages move")
    return _table((*head, f"lower bound in ms (times faster than bf16): {names['triton']}; {names['mosaic_tpu']}"), rows)


def causes(lines: list[Line]) -> str:
    """Operands that move too much."""
    rows = [
        (
            x.setting.implementation,
            _where(x.setting),
            x.operation,
            f"{x.moved / x.must:.2f}",
            x.causes + (f" ({x.assumed})" * bool(x.assumed)),
        )
        for x in lines
        if x.moved / x.must > GOAL
    ]
    return _table(("implementation", "setting", "operation", "ratio", "operands that move more than they must"), rows)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows))


def report(lines: list[Line], compiled: list[tuple[str, ...]], missing: list[str]) -> str:
    """The section of docs/results.md."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout.strip()
    command = shlex.join(["python", "scripts/roofline.py", *sys.argv[1:]])
    parts = [
        "## Roofline: modelled, not measured",
        f"{datetime.date.today()}, commit {commit}{' with changes' if changed else ''}, JAX {jax.__version__}, `{command}`. Nothing here ran "
        f"on a GPU or TPU: bytes and FLOPs are counted from the kernels' jaxprs (scripts/traffic.py), bandwidth and bf16 rate are those of the "
        f"datasheets (scripts/chips.py). Batch {BATCH}, one layer unless said, {LIVE} recent tokens a head, every head alike; an event is done "
        f"each {FLUSH} steps. *Must move*: live tokens' payload and metadata, significance in and out, window, q, output, page ids, each once. "
        "*Moves*: what the kernels ask of device memory, L2 included; FLOPs are those of the dot products as padded. The lower bound is the "
        "larger of bytes / bandwidth and FLOP / rate; scratch that fits the L2 and what programs share (prefill, column sums) is not charged "
        "again. Partly written 32-byte sectors, weights and other layers' work are left out.",
        "### A decode step, all layers, against bf16 pages",
        step_table(lines),
        *(part for name in PLATFORM for part in (f"### {name}: one layer", counted_table(lines, name))),
        f"### Ratios above {GOAL}",
        causes(lines),
        "### Compiled",
    ]
    if missing:
        parts.append(f"The compiled part is missing: no module {', '.join(missing)} (CONTRIBUTING.md).")
    if compiled:
        head = ("implementation", "setting", "operation", "chip", "kernels", "temporary", "copies of pool or window", "XLA kernels around")
        parts.append(_table(head, compiled))
    return "\n\n".join(parts)
