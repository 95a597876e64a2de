"""Which stored tokens leave their tier, as one Pallas kernel for TPU and inside apply_event's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dispatch import tpu_interpreter
from ..pages import PageLayout, Pages, page_column
from .reference import Moves, Rule

OLDEST = jnp.iinfo(jnp.int32).max


@dataclass(frozen=True)
class Blocks:
    """How the scan of a tier's significance and positions is cut.

    Attributes:
        pages: that one step reads.
        buffers: steps whose pages are in VMEM at a time: one being read, the others on their way.
    """

    pages: int = 8
    buffers: int = 4


class TokenData(NamedTuple):
    """Significance and position in HBM, and where pages of them arrive in VMEM."""

    significance: Any  # float32 [P, blocks, T]
    position: Any  # uint16 or int32 [P, blocks, T]
    near_significance: Any  # float32 [buffers, pages of a step, blocks, T]
    near_position: Any
    arrived: Any  # a semaphore a buffer

    @staticmethod
    def scratch(layout: PageLayout, cut: Blocks) -> list:
        """Shapes of the last three."""
        shape = (cut.buffers, cut.pages, layout.token_data_rows, layout.tokens)
        return [
            pltpu.VMEM(shape, jnp.float32),
            pltpu.VMEM(shape, jnp.dtype(layout.position_dtype)),
            pltpu.SemaphoreType.DMA((cut.buffers,)),
        ]


class Thresholds(NamedTuple):
    """Scalars of one head that decide what leaves."""

    high: Array  # float32
    low: Array
    query_spans: Sequence[tuple[Array, Array]]  # int32 (end, length) of each span

    def mean(self, total: Array, position: Array) -> Array:
        """`mean_significance` of reference.py."""
        scored_by = sum(jnp.clip(end - position, 0, length) for end, length in self.query_spans)
        return total / jnp.maximum(scored_by, 1).astype(jnp.float32)

    def leaving(self, mean: Array, tier: int, tiers: int) -> tuple[Array, Array]:
        """Masks of the tokens that are dropped and of those that fall from tier 0 to tier 1."""
        dropped = mean < self.low
        if tier == 0 and tiers == 2:
            return dropped, (mean < self.high) & ~dropped
        return dropped, jnp.zeros_like(dropped)


def scan_pages(
    token_data: TokenData, cut: Blocks, count: Array, page_id: Callable, visit: Callable, carry
):
    """`carry = visit(index of the first page, significance, int32 position, carry)` for each step
    over pages 0 to `count` of a tier.

    The arrays are `[pages of a step, blocks, T]`; pages beyond `count` hold rubbish.
    `page_id(index)` gives a page's id.
    """
    steps = pl.cdiv(count, cut.pages)

    def copies(step, i, page) -> list:
        buffer = lax.rem(step, cut.buffers)
        pairs = (
            (token_data.significance, token_data.near_significance),
            (token_data.position, token_data.near_position),
        )
        return [
            pltpu.make_async_copy(far.at[page], near.at[buffer, i], token_data.arrived.at[buffer])
            for far, near in pairs
        ]

    def pages_of(step):
        return jnp.clip(count - step * cut.pages, 0, cut.pages)

    def ask(step) -> None:
        @pl.loop(0, pages_of(step))
        def _(i):
            for copy in copies(step, i, page_id(step * cut.pages + i)):
                copy.start()

    def body(step, carry):
        ask(step + cut.buffers - 1)

        @pl.loop(0, pages_of(step))
        def _(i):
            for copy in copies(step, i, 0):
                copy.wait()

        buffer = lax.rem(step, cut.buffers)
        first, significance = step * cut.pages, token_data.near_significance[buffer]
        position = token_data.near_position[buffer].astype(jnp.int32)
        return visit(first, significance, position, carry)

    for step in range(cut.buffers - 1):
        ask(jnp.int32(step))
    return lax.fori_loop(0, steps, body, carry)


def slots(layout: PageLayout, tier: int, first, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Slots of the tokens of pages `first ...`, int32 of `shape [pages, blocks, T]`, and a mask of
    the blocks that the tier has.
    """
    page, block, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(3))
    slot = ((first + page) * layout.blocks[tier] + block) * layout.tokens + lane
    return slot, block < layout.blocks[tier]


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
    """`count_moves` of api.py on TPU, of a layout that is scored. Significance and positions of
    live pages are read once.
    """
    del max_len  # lengths are read
    (heads, max_pages), tiers = page_table.shape, layout.tiers
    cut = Blocks() if blocks is None else blocks
    numbers = [
        jnp.where(rule.has_new_tokens[:, None], tier_len, 0),
        rule.receives.astype(jnp.int32),
        rule.query_spans.reshape(heads, -1),
    ]
    numbers = jnp.concatenate(numbers, axis=1)

    def of_head(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, width), lambda head: (head, 0, 0), memory_space=pltpu.SMEM)

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    page_bytes = layout.tokens * layout.token_data_rows * layout.token_data_bytes
    found = pl.pallas_call(
        partial(_count, layout=layout, cut=cut, one_victim=one_victim, max_pages=max_pages),
        grid=(heads,),
        in_specs=[of_head(numbers.shape[1]), of_head(2), of_head(max_pages), hbm, hbm],
        out_specs=of_head(2 * tiers + 1),
        out_shape=jax.ShapeDtypeStruct((heads, 1, 2 * tiers + 1), jnp.int32),
        scratch_shapes=TokenData.scratch(layout, cut),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=16 * heads * max_pages * layout.tokens,
            transcendentals=0,
            bytes_accessed=heads * max_pages * page_bytes,
        ),
        interpret=tpu_interpreter(interpret),
        name="count_moves",
    )(*(x[:, None] for x in (numbers, rule.tau, page_table)), pages.significance, pages.position)
    found = found[:, 0]
    return Moves(found[:, :tiers], found[:, tiers], found[:, tiers + 1 :])


def _count(
    numbers,
    tau,
    page_table,
    *refs,
    layout: PageLayout,
    cut: Blocks,
    one_victim: bool,
    max_pages: int,
) -> None:
    """One head: count what leaves each tier (DiffKV, arXiv 2412.03131 sec. 4, Algorithm 1).

    Scalars int32 [1, n] in SMEM: lengths (0 where nothing may leave), tiers that receive, spans;
    thresholds float32 [1, 2]; table [1, max_pages]. Reads T * blocks * (4 + position bytes) bytes
    of each live page, writes int32 [1, 2 tiers + 1]: dropped, demoted, victims.
    """
    significance, position, found, *near = refs
    token_data, tiers = TokenData(significance, position, *near), layout.tiers
    spans = range(2 * tiers, numbers.shape[1], 2)
    rule = Thresholds(tau[0, 0], tau[0, 1], [(numbers[0, i], numbers[0, i + 1]) for i in spans])
    count = _least_of_tier if one_victim else _all_of_tier
    for tier in range(tiers):
        length, receives = numbers[0, tier], numbers[0, tiers + tier] > 0

        def scan(visit: Callable, carry, tier=tier, length=length):
            def live(first, total, position, carry):
                slot, own = slots(layout, tier, first, total.shape)
                mean = rule.mean(total, position)
                return visit(mean, position, slot, own & (slot < length), carry)

            def page_id(index):
                return page_table[0, page_column(tier, index, max_pages)]

            return scan_pages(token_data, cut, layout.pages_for(tier, length), page_id, live, carry)

        dropped, demoted, victim = count(scan, rule, tier, layout, cut, receives)
        found[0, tier], found[0, tiers + 1 + tier] = dropped, victim
        if tier == 0:
            found[0, tiers] = demoted


def _all_of_tier(
    scan: Callable, rule: Thresholds, tier: int, layout: PageLayout, cut: Blocks, receives: Array
):
    """How many tokens of a tier are dropped and demoted."""
    del receives
    zero = jnp.zeros((cut.pages, layout.token_data_rows, layout.tokens), jnp.int32)

    def visit(mean, position, slot, live, carry):
        pairs = zip(carry, rule.leaving(mean, tier, layout.tiers), strict=True)
        return tuple(count + jnp.where(live & leave, 1, 0) for count, leave in pairs)

    return *(jnp.sum(count) for count in scan(visit, (zero, zero))), jnp.int32(-1)


def _least_of_tier(
    scan: Callable, rule: Thresholds, tier: int, layout: PageLayout, cut: Blocks, receives: Array
):
    """The same where only the least significant, the oldest of equals, may leave; and its slot."""
    shape = (cut.pages, layout.token_data_rows, layout.tokens)

    def visit(mean, position, slot, live, carry):
        best = carry
        less = live & ((mean < best[0]) | ((mean == best[0]) & (position < best[1])))
        pairs = zip((mean, position, slot), best, strict=True)
        return tuple(jnp.where(less, new, old) for new, old in pairs)

    oldest = (jnp.full(shape, OLDEST, jnp.int32) for _ in range(2))
    mean, position, slot = scan(visit, (jnp.full(shape, jnp.inf, jnp.float32), *oldest))
    least = jnp.min(mean)
    oldest = jnp.min(jnp.where(mean == least, position, OLDEST))
    victim = jnp.min(jnp.where((mean == least) & (position == oldest), slot, OLDEST))
    some = receives & (victim != OLDEST)
    dropped, falls = (some & leave for leave in rule.leaving(least, tier, layout.tiers))
    counts = dropped.astype(jnp.int32), falls.astype(jnp.int32)
    return *counts, jnp.where(dropped | falls, victim, -1)
