"""Every kernel against the XLA reference on the device at hand: attention, prompt chunks and the
recent window.

The states are those of the tests (`testing.random_pool`): random codes, and rubbish (NaN, 255,
wild page ids) in all that is not live.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.report import FAILED, OK, Row, Section
from benchmarks.common.states import Setting
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.decode_attention import Heads, Sliding, decode_attention
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.pallas_kernels.prefill_attention import Chunk, Scale, column_sums, prefill_attention
from diffkv_jax.pallas_kernels.recent_window import append_recent, shift_recent
from diffkv_jax.testing.random_pool import on_device, random_pool

COLUMNS = {"kernel": "", "case": "", "error": ".1e", "limit": ".0e", "status": ""}
# of the dtype that the kernel multiplies in; zeros have an error of 1
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
SLOTS = 9
Job = tuple[Row, Callable[[], Row | list[Row]]]  # labels of a row, and what measures it


def section(seconds: float) -> Section:
    """The table of comparisons."""
    notes = [
        "error: largest ||kernel - XLA|| / ||XLA|| of the outputs, XLA at full float32 precision "
        "on the same device; "
        "0: every bit is the same.",
        "What must not change (dead pages, lanes and slots) is compared bit by bit.",
    ]
    return Section("Every Triton kernel against XLA", COLUMNS, seconds, notes=notes)


def verdict(error: float, limit: float) -> Row:
    """The row of a comparison; NaN fails."""
    return {"error": float(error), "limit": limit, "status": OK if error <= limit else FAILED}


def distance(got: Any, wanted: Any, changed: Any = None) -> float:
    """`||got - wanted|| / ||wanted||`, infinite when that is no number; also where the values that
    are not `changed` (a mask) differ.
    """
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    if got.shape != wanted.shape:
        return float("inf")
    changed = np.ones(wanted.shape, bool) if changed is None else changed
    if not np.array_equal(got[~changed], wanted[~changed], equal_nan=True):
        return float("inf")
    got, wanted = got[changed], wanted[changed]
    if not (np.isfinite(got).all() and np.isfinite(wanted).all()):
        return float("inf")
    return (
        float(np.linalg.norm(got - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
        if wanted.size
        else 0.0
    )


def both(
    setting: Setting, function: Callable[[Kernels], Callable], *operands: Any
) -> tuple[Any, Any]:
    """What the kernel and the reference give for the same operands, in NumPy."""
    got = jax.device_get(jax.jit(function(setting.kernels))(*operands))
    with jax.default_matmul_precision("highest"):
        return got, jax.device_get(jax.jit(function(XLA))(*operands))


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison of an attention."""

    tiers: tuple[str, ...]
    head_dim: int
    group: int
    dtype: str = "float32"
    cap: float | None = None
    scored: bool = True
    sliding: int | None = None
    chunk: int = 0  # of a prompt; 0: decode
    observe: int = 0

    def __str__(self) -> str:
        name = f"{'+'.join(self.tiers)}, G={self.group}, d={self.head_dim}, {self.dtype}"
        extra = {
            "cap": self.cap,
            "sliding": self.sliding,
            "chunk": self.chunk or None,
            "observe": self.observe or None,
        }
        name += "".join(f", {key} {value}" for key, value in extra.items() if value is not None)
        return name if self.scored else f"{name}, not scored"

    def layout(self, max_len: int, tokens: int) -> PageLayout:
        """Pages of the case's tiers."""
        formats = tuple(KVFormat.parse(name, self.dtype) for name in self.tiers)
        return PageLayout.solve(
            formats, self.head_dim, tokens=tokens, max_len=max_len, scored=self.scored
        )


PAIR, GROUPED = ("K8V4", "K4V2"), ("K8V4:1,2", "K4V2:2,4")
DECODE = (
    Case(PAIR, 128, 4),
    Case(PAIR, 128, 4, "bfloat16"),
    Case(("full",), 128, 4, "bfloat16", scored=False),
    Case(PAIR, 64, 3),
    Case(PAIR, 128, 1),
    Case(PAIR, 256, 8),
    Case(PAIR, 128, 8, "bfloat16", sliding=300),
    Case(GROUPED, 64, 6, cap=5.0),
    Case(("K8V8", "K4V1"), 128, 16),
    Case(("K4V4",), 64, 3, scored=False),
    Case(("full", "K4V2"), 64, 3),
)
PREFILL = (
    Case(PAIR, 128, 4, chunk=128, observe=64),
    Case(PAIR, 128, 4, "bfloat16", chunk=128, observe=64),
    Case(PAIR, 64, 3, cap=4.0, chunk=128, observe=100),
    Case(GROUPED, 256, 2, chunk=64, observe=16),
    Case(("full",), 64, 1, "bfloat16", chunk=64, observe=64),
)
TINY_DECODE = (
    Case(PAIR, 64, 3, cap=5.0),
    Case(("full",), 64, 1, "bfloat16", scored=False, sliding=40),
)
TINY_PREFILL = (Case(PAIR, 64, 3, chunk=32, observe=16),)


def jobs(setting: Setting) -> list[list[Job]]:
    """Comparisons of attention, prompt chunks and the recent window, a list a kernel, the most
    telling first.
    """
    decode, prefill = (TINY_DECODE, TINY_PREFILL) if setting.tiny else (DECODE, PREFILL)
    return [
        [
            ({"kernel": "decode attention", "case": str(case)}, partial(decode_row, setting, case))
            for case in decode
        ],
        [
            (
                {"kernel": "prefill attention, column sums", "case": str(case)},
                partial(prefill_rows, setting, case),
            )
            for case in prefill
        ],
        [
            ({"kernel": "append, shift", "case": dtype}, partial(window_rows, setting, dtype))
            for dtype in ("bfloat16", "float32")
        ],
    ]


def measure(table: Section, jobs: list[list[Job]]) -> None:
    """Take the first comparison of every kernel, then the second ones ..., as far as the time goes;
    the table is in kernels' order.
    """
    for turn in itertools.zip_longest(*jobs):
        for job in filter(None, turn):
            table.measure(*job)
    table.rows.sort(key=lambda row: row["kernel"])


def _stored(
    setting: Setting, case: Case, max_len: int
) -> tuple[PageLayout, Pages, Heads, np.ndarray]:
    """Layout, pool and heads of a case, and the mask of significances that live tokens have."""
    layout = case.layout(max_len, setting.kernels.tokens_per_block)
    most = max_len - 200
    sizes = [(0, 0), (0, 70), (130, 0), (33, 65), (most - 5, 5), (0, 0), (1, most)]
    lengths = [(a, b)[: layout.tiers] for a, b in (sizes[::2] if setting.tiny else sizes)]
    recent = [0, 3, 9, 1, 8, 5, 0][:: 2 if setting.tiny else 1]
    pool = random_pool(layout, lengths, recent, max_len=max_len, slots=SLOTS, seed=case.group)
    live = ~np.isnan(pool.pages["significance"])
    pages, heads = on_device(pool, Pages, Heads)
    # of the size of what a step adds
    pages = dataclasses.replace(pages, significance=pages.significance * 1e-3)
    windows = {name: getattr(heads, name).astype(case.dtype) for name in ("recent_k", "recent_v")}
    return layout, pages, heads._replace(**windows), live


def decode_row(setting: Setting, case: Case) -> Row:
    """Output, significance and scores of the recent tokens."""
    max_len = 300 if setting.tiny else 2300
    layout, pages, heads, live = _stored(setting, case, max_len)
    q = jax.random.normal(
        jax.random.key(9), (len(heads.tier_len), case.group, case.head_dim)
    ).astype(case.dtype)
    sliding = (
        None
        if case.sliding is None
        else Sliding(case.sliding, heads.tier_len.max(axis=1) + heads.recent_len)
    )

    def attend(kernels: Kernels):
        scale = {
            "sm_scale": 1.5 * case.head_dim**-0.5,
            "logits_soft_cap": case.cap,
            "kernels": kernels,
            "max_len": max_len,
        }
        return lambda q, pages, heads: decode_attention(
            q, pages, layout, heads, sliding=sliding, **scale
        )

    got, wanted = both(setting, attend, q, pages, heads)
    error = max(
        distance(got[0], wanted[0]), distance(got[2], wanted[2]), distance(got[1], wanted[1], live)
    )
    return verdict(error, TOLERANCE[case.dtype])


def prefill_rows(setting: Setting, case: Case) -> list[Row]:
    """Output and log-sum-exp of real rows; sums of stored, recent and chunk tokens, from the
    reference's log-sum-exp.
    """
    max_len, c = 300 if setting.tiny else 900, case.chunk
    layout, pages, heads, live = _stored(setting, case, max_len)
    count = len(heads.tier_len)
    length = np.array([c, 5, 0, c // 2 + 1, c, 1, c][:count], np.int32)
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(count, n, c, case.head_dim)) for n in (case.group, 1, 1))
    q, k, v = (jnp.asarray(x, case.dtype) for x in (q, k[:, 0], v[:, 0]))
    chunk = Chunk(q, k, v, jnp.asarray(length))
    scale = Scale(1.3 * case.head_dim**-0.5, case.cap)
    real = np.arange(c) >= c - length[:, None]

    def attend(kernels):
        return lambda *a: prefill_attention(a[0], a[1], layout, a[2], scale, kernels=kernels)

    got, wanted = both(setting, attend, chunk, pages, heads)
    rows = [
        (np.moveaxis(out, 1, 2)[real], np.moveaxis(lse, 1, 2)[real]) for out, lse in (got, wanted)
    ]
    attention = max(distance(a, b) for a, b in zip(*rows, strict=True))

    def score(kernels: Kernels):
        return lambda *a: column_sums(
            a[0], a[3], case.observe, a[1], layout, a[2], scale, kernels=kernels
        )

    lse = jnp.where(jnp.asarray(real)[:, None], jnp.asarray(wanted[1]), 0.0)
    got, wanted = both(setting, score, chunk, pages, heads, lse)
    sums = max(
        distance(got.recent, wanted.recent),
        distance(got.chunk, wanted.chunk),
        distance(got.pages, wanted.pages, live),
    )
    limit = TOLERANCE[case.dtype]
    named = {"prefill attention": attention, "column sums": sums}
    return [
        {"kernel": name, "case": str(case), **verdict(error, limit)}
        for name, error in named.items()
    ]


def window_rows(setting: Setting, dtype: str) -> list[Row]:
    """Appending and shifting, bit by bit."""
    rng, shape = np.random.default_rng(3), (2, 7, 24, 64) if setting.tiny else (3, 37, 96, 128)
    heads, slots = shape[1:3]
    k, v = (jnp.asarray(rng.normal(size=shape), dtype).at[0].set(jnp.nan) for _ in range(2))
    scores = jnp.asarray(rng.uniform(size=shape[:3]), jnp.float32)
    new = [jnp.asarray(rng.normal(size=(heads, shape[3])), jnp.float32) for _ in range(2)]
    slot = jnp.asarray(rng.integers(-1, slots + 1, heads), jnp.int32)
    shift = (
        jnp.asarray(rng.integers(0, slots + 1, heads), jnp.int32).at[:2].set(jnp.array([0, slots]))
    )
    layer = jnp.int32(1)
    appended = both(
        setting, lambda kernels: partial(append_recent, kernels=kernels), k, v, layer, *new, slot
    )
    shifted = both(
        setting, lambda kernels: partial(shift_recent, kernels=kernels), k, v, scores, layer, shift
    )
    rows = []
    for name, (got, wanted) in {"append_recent": appended, "shift_recent": shifted}.items():
        same = all(
            np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)
            for a, b in zip(got, wanted, strict=True)
        )
        rows.append(
            {
                "kernel": name,
                "case": f"{dtype} {list(shape)}",
                **verdict(0.0 if same else float("inf"), 0.0),
            }
        )
    return rows
