"""What feeds the TPU kernel of decode attention: plan, references, pages streamed into VMEM."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..pages import PageLayout, page_column


@dataclass(frozen=True)
class Plan:
    """What is known before the kernel runs. A chunk is `pages[tier]` pages of a tier of a head,
    which one step of the loop takes.
    """

    layout: PageLayout
    pages: tuple[int, ...]
    buffers: int
    heads: int  # of one core
    max_pages: int
    sm_scale: float
    soft_cap: float | None
    window: int | None

    @property
    def positions(self) -> bool:
        """Whether positions are read: for a sliding window, or for keys stored without RoPE."""
        return self.window is not None or self.layout.rope is not None

    def chunk_tokens(self, tier: int) -> int:
        """Tokens of a full chunk."""
        return self.pages[tier] * self.layout.tokens_per_page(tier)


class Refs(NamedTuple):
    """B heads of G query heads, P pages in the pool, N slots of the window, C pages a chunk."""

    # scalars in SMEM
    page_table: Any  # int32 [B, max_pages]
    tier_len: Any  # int32 [B, tiers]
    recent_len: Any  # int32 [B]
    layer: Any  # int32 [1]
    # blocks of one head in VMEM
    q: Any  # float32 or bfloat16 [G, d]
    recent_k: Any  # [N, d]
    recent_v: Any  # [N, d]
    output: Any  # float32 [G, d]
    recent_scores: Any  # float32 [1, N]
    # the pool in HBM
    payload: Any  # uint8 [P, rows, T]
    # scratch
    payload_buffer: Any  # uint8 [buffers, C, rows, T]
    arrived: Any  # a semaphore a buffer
    cursor: Any  # int32 [3] in SMEM: head and number of the next chunk to ask for, chunks asked for
    # where the pages have metadata
    meta: Any = None  # int16 (bits of float16) [P, meta_rows, T]
    meta_buffer: Any = None  # int16 [buffers, C, meta_rows, T]
    # with a sliding window
    query_position: Any = None  # int32 [B] in SMEM
    # where positions are read
    position: Any = None  # [P, blocks, T]
    position_buffer: Any = None  # [buffers, C, blocks, T]
    # where keys are stored without their rotary embedding
    frequencies: Any = None  # float32 [d / 2, 1]
    # of tier and tensor (K = 0, V = 1), where codes are looked up: int16 (bits of float16) or
    # bfloat16 [d or 1, levels], and float32 in whole registers
    tables: Any = {}
    levels: Any = {}
    # when the layout is scored
    old_significance: Any = None  # the same memory as significance
    significance: Any = None  # float32 [P, blocks, T] in HBM
    logits: Any = None  # float32 [blocks of a head, G, T] in VMEM
    scores: Any = None  # float32 [2, pages of a head, blocks, T] in VMEM, of even and of odd heads
    scores_read: Any = None  # semaphore
    scores_written: Any = None  # semaphore


class Stream:
    """The chunks of all heads of a core in order, `buffers - 1` of them on their way to VMEM while
    one is being read.

    A head has the chunks of tier 0, then those of tier 1; a head without any has an empty chunk of
    tier 0.
    """

    def __init__(self, refs: Refs, plan: Plan, end: Array):
        self.refs, self.plan, self.end = refs, plan, end

    def chunks(self, head, tier: int):
        """Chunks of a tier."""
        lengths = [self.refs.tier_len[head, t] for t in range(self.plan.layout.tiers)]
        count = pl.cdiv(lengths[tier], self.plan.chunk_tokens(tier))
        return jnp.where(sum(lengths) == 0, 1, count) if tier == 0 else count

    def pages(self, head, tier: int):
        """Pages of a tier."""
        return pl.cdiv(self.refs.tier_len[head, tier], self.plan.layout.tokens_per_page(tier))

    def each_page(self, head, tier: int, chunk, visit: Callable) -> None:
        """`visit(index in the chunk, page id)` of each page of a chunk; unrolled for a full one."""
        count = self.plan.pages[tier]
        first = chunk * count
        live = jnp.minimum(self.pages(head, tier) - first, count)

        def visit_page(i) -> None:
            visit(i, self.refs.page_table[head, page_column(tier, first + i, self.plan.max_pages)])

        @pl.when(live == count)
        def _():
            for i in range(count):
                visit_page(i)

        pl.when(live < count)(lambda: pl.loop(0, live)(visit_page))

    def first_page(self, head, tier: int):
        """Where among the pages of a head, all tiers counted, those of a tier begin."""
        return 0 if tier == 0 else self.pages(head, 0)

    def open(self, head) -> None:
        """Ask for the first chunks, from `head` on."""
        cursor = self.refs.cursor
        cursor[0], cursor[1], cursor[2] = head, 0, 0

        @pl.loop(0, self.plan.buffers - 1)
        def _(_):
            self._ask()

    def next(self, head, tier: int, chunk):
        """Ask for one chunk more and wait for the next one; returns its buffer."""
        self._ask()
        buffer = lax.rem(self.refs.cursor[2], self.plan.buffers)

        def wait(i, page) -> None:
            for copy in self._copies(buffer, i, page):
                copy.wait()

        self.each_page(head, tier, chunk, wait)
        return buffer

    def _ask(self) -> None:
        cursor, tiers = self.refs.cursor, self.plan.layout.tiers
        head, number = cursor[0], cursor[1]
        buffer = lax.rem(cursor[2], self.plan.buffers)
        cursor[2] += 1

        def start(i, page) -> None:
            for copy in self._copies(buffer, i, page):
                copy.start()

        @pl.when(head < self.end)
        def _():
            begin = 0
            for tier in range(tiers):
                count = self.chunks(head, tier)

                @pl.when((number >= begin) & (number < begin + count))
                def _(tier=tier, chunk=number - begin):
                    self.each_page(head, tier, chunk, start)

                begin += count
            last = number + 1 == begin
            cursor[0], cursor[1] = jnp.where(last, head + 1, head), jnp.where(last, 0, number + 1)

    def _copies(self, buffer, index, page) -> list:
        """The copies that bring a page to place `index` of a buffer."""
        r = self.refs
        arrays = (
            (r.payload, r.payload_buffer),
            (r.meta, r.meta_buffer),
            (r.position, r.position_buffer),
        )
        return [
            pltpu.make_async_copy(pool.at[page], near.at[buffer, index], r.arrived.at[buffer])
            for pool, near in arrays
            if near is not None
        ]
