"""Which stored tokens leave their tier, on GPUs (Triton), a program a head; for apply_event too."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..pages import PageLayout, Pages, page_column
from .reference import Moves, Rule


@dataclass(frozen=True)
class Blocks:
    """Sizes of one program of `count_moves`."""

    slots: int = 256  # tokens classified at once, a power of two
    warps: int = 4


class Slots(NamedTuple):
    """Where tokens of one tier of one head lie, int32 `[n]` each. Those not `valid` are on page
    `num_pages`, which is nowhere: every access masks them, and the interpreter drops what is
    written outside of an array.
    """

    page: Array
    block: Array
    lane: Array
    valid: Array  # bool [n]


def locate(
    page_table: Any, num_pages: int, layout: PageLayout, tier: int, head, slot: Array, valid: Array
) -> Slots:
    """Slots number `slot [n]` of a tier; `page_table` is a Ref int32 `[B, max_pages]`."""
    per_page, lanes, max_pages = layout.tokens_per_page(tier), layout.tokens, page_table.shape[1]
    slot = jnp.where(valid, slot, 0)
    index = lax.div(slot, jnp.int32(per_page))
    column = jnp.where(valid, page_column(tier, index, max_pages), max_pages)
    page = plgpu.load(page_table.at[head, column], mask=valid, other=0)
    within = slot - index * per_page
    block = lax.div(within, jnp.int32(lanes))
    return Slots(jnp.where(valid, page, num_pages), block, within - block * lanes, valid)


def read_token_data(significance: Any, position: Any, slots: Slots) -> tuple[Array, Array]:
    """Significance float32 and position int32 `[n]`, 0 where not valid; Refs as in `Pages`."""
    at = (slots.page, slots.block, slots.lane)
    refs = (significance, position)
    total, where = (plgpu.load(ref.at[at], mask=slots.valid, other=0) for ref in refs)
    return total, where.astype(jnp.int32)


def divide(total: Array, count: Array) -> Array:
    """float32 `total / count`, rounded as IEEE 754 asks: the quotient of Triton may be 2 ulp off,
    so what it leaves over is divided again.

    `count` int32 in `[1, 2**24)`. Quotient and count are cut in halves of 12 bits, so that the
    products are exact (Dekker 1971).
    """
    quotient = total / count.astype(jnp.float32)
    bits = lax.bitcast_convert_type(quotient, jnp.int32)
    high = lax.bitcast_convert_type(bits & ~0xFFF, jnp.float32)
    low = quotient - high
    count_high, count_low = ((count & mask).astype(jnp.float32) for mask in (~0xFFF, 0xFFF))
    rest = total - high * count_high - high * count_low - low * count_high - low * count_low
    return quotient + rest / count.astype(jnp.float32)


class Judge(NamedTuple):
    """`classify` of one head: thresholds and clocks as scalars."""

    tau: tuple[Array, Array]  # float32, high and low
    query_spans: tuple[tuple[Array, Array], ...]  # int32 (end, length) of each span
    tiers: int

    @staticmethod
    def of(tau: Any, query_spans: Any, head, tiers: int) -> "Judge":
        """Read from the Refs of a `Rule`."""
        spans = tuple(
            (query_spans[head, span, 0], query_spans[head, span, 1])
            for span in range(query_spans.shape[1])
        )
        return Judge((tau[head, 0], tau[head, 1]), spans, tiers)

    def mean(self, total: Array, position: Array) -> Array:
        """`mean_significance` of tokens `[n]`."""
        scored_by = jnp.zeros_like(position)
        for end, length in self.query_spans:
            scored_by += jnp.minimum(jnp.maximum(end - position, 0), length)
        return divide(total, jnp.maximum(scored_by, 1))

    def leaving(self, mean: Array, tier: int) -> tuple[Array, Array]:
        """Masks of the tokens of a tier that are dropped, and that are demoted."""
        dropped = mean < self.tau[1]
        if tier == 0 and self.tiers == 2:
            return dropped, (mean < self.tau[0]) & ~dropped
        return dropped, dropped & False


class _Inputs(NamedTuple):
    """The Refs that the kernel reads."""

    tau: Any  # float32 [B, 2]
    query_spans: Any  # int32 [B, spans, 2]
    has_new_tokens: Any  # int32 [B]
    receives: Any  # int32 [B, tiers]
    page_table: Any  # int32 [B, max_pages]
    tier_len: Any  # int32 [B, tiers]
    significance: Any  # float32 [num_pages, blocks, T]
    position: Any  # uint16 or int32 [num_pages, blocks, T]


def count_moves(
    pages: Pages,
    layout: PageLayout,
    page_table: Array,
    tier_len: Array,
    rule: Rule,
    *,
    one_victim: bool,
    max_len: int,
    interpret: bool | Literal["checked"],
    blocks: Blocks | None = None,
) -> Moves:
    """`count_moves` of api.py on GPUs, one launch. The layout is scored."""
    del max_len  # lengths are read
    blocks, heads, tiers = blocks or Blocks(), page_table.shape[0], layout.tiers
    has_new_tokens, receives = (x.astype(jnp.int32) for x in (rule.has_new_tokens, rule.receives))
    per_tier = jax.ShapeDtypeStruct((heads, tiers), jnp.int32)
    dropped, demoted, victim = pl.pallas_call(
        partial(_kernel, layout=layout, one_victim=one_victim, blocks=blocks),
        grid=(heads,),
        out_shape=(per_tier, jax.ShapeDtypeStruct((heads,), jnp.int32), per_tier),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=bool(interpret),
        name="count_moves",
    )(
        *(rule.tau, rule.query_spans, has_new_tokens, receives),
        *(page_table, tier_len, pages.significance, pages.position),
    )
    return Moves(dropped, demoted, victim)


def _kernel(*refs, layout: PageLayout, one_victim: bool, blocks: Blocks) -> None:
    """Program `head`: classify the head's stored tokens (DiffKV, arXiv 2412.03131, Algorithm 1) and
    count those that leave.

    Reads 4 bytes of significance and 2 or 4 of position of every live token and one table entry a
    token (from cache); writes `dropped`, `victim` int32 `[B, tiers]` and `demoted` int32 `[B]`.
    """
    inputs, (dropped, demoted, victim) = _Inputs(*refs[:-3]), refs[-3:]
    head = pl.program_id(0)
    judge = Judge.of(inputs.tau, inputs.query_spans, head, layout.tiers)
    for tier in range(layout.tiers):
        length = jnp.where(inputs.has_new_tokens[head] != 0, inputs.tier_len[head, tier], 0)
        if one_victim:
            gone, falls, slot = _least(inputs, layout, tier, head, judge, length, blocks.slots)
        else:
            gone, falls = _count(inputs, layout, tier, head, judge, length, blocks.slots)
            slot = jnp.int32(-1)
        dropped[head, tier], victim[head, tier] = gone, slot
        if tier == 0:
            demoted[head] = falls


def _tokens(
    inputs: _Inputs, layout: PageLayout, tier: int, head, judge: Judge, slot: Array, live: Array
) -> tuple[Array, Array]:
    """Mean significance and position of the tokens at `slot [n]`."""
    slots = locate(inputs.page_table, inputs.position.shape[0], layout, tier, head, slot, live)
    total, position = read_token_data(inputs.significance, inputs.position, slots)
    return judge.mean(total, position), position


def _count(
    inputs: _Inputs, layout: PageLayout, tier: int, head, judge: Judge, length, n: int
) -> tuple[Array, Array]:
    """How many of the first `length` tokens are dropped and demoted, `n` at a time."""

    def body(step, counts):
        slot = step * n + jnp.arange(n, dtype=jnp.int32)
        live = slot < length
        mean, _ = _tokens(inputs, layout, tier, head, judge, slot, live)
        return tuple(
            count + (live & leaves).astype(jnp.int32)
            for count, leaves in zip(counts, judge.leaving(mean, tier), strict=True)
        )

    none = jnp.zeros((n,), jnp.int32)
    dropped, demoted = lax.fori_loop(0, pl.cdiv(length, n), body, (none, none))
    return dropped.sum(), demoted.sum()


def _least(
    inputs: _Inputs, layout: PageLayout, tier: int, head, judge: Judge, length, n: int
) -> tuple[Array, Array, Array]:
    """Whether the least significant (the oldest) is dropped, or demoted, and its slot, or -1."""
    last = jnp.iinfo(jnp.int32).max

    def body(step, best):
        slot = step * n + jnp.arange(n, dtype=jnp.int32)
        live = slot < length
        mean, position = _tokens(inputs, layout, tier, head, judge, slot, live)
        less = live & ((mean < best[0]) | ((mean == best[0]) & (position < best[1])))
        return tuple(
            jnp.where(less, new, old) for new, old in zip((mean, position, slot), best, strict=True)
        )

    lasts = (jnp.full((n,), last, jnp.int32) for _ in range(2))
    start = (jnp.full((n,), jnp.inf, jnp.float32), *lasts)
    mean, position, slot = lax.fori_loop(0, pl.cdiv(length, n), body, start)
    least = mean.min()
    oldest = jnp.where(mean == least, position, last).min()
    slot = jnp.where((mean == least) & (position == oldest), slot, last).min()
    may_leave = (inputs.receives[head, tier] != 0) & (length > 0)
    gone, falls = (may_leave & leaves for leaves in judge.leaving(least, tier))
    return gone.astype(jnp.int32), falls.astype(jnp.int32), jnp.where(gone | falls, slot, -1)
