"""Pages of one head between the pool and VMEM, and the head's table, lengths and free pages."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..pages import PageLayout, page_column
from ..plan_event.mosaic_tpu import Blocks, TokenData
from .mosaic_tpu_columns import Columns

TAIL, HOLE = 0, 1  # the page at the tail of a tier and the page whose holes are being filled
NEXT = 2  # only where pages arrive: the tail of the next head


@dataclass(frozen=True)
class Plan:
    """What is known before the kernel runs. `numbers` names the columns of the heads' scalars."""

    layout: PageLayout
    num_pages: int
    max_pages: int
    one_victim: bool
    numbers: dict[str, range]
    scan: Blocks


class Pool(NamedTuple):
    """Arrays of the pool; absent where the layout has none of the kind."""

    payload: Any  # uint8 [P, rows, T]
    position: Any  # uint16 or int32 [P, blocks, T]
    meta: Any = None  # int16 (bits of float16) [P, meta_rows, T]
    significance: Any = None  # float32 [P, blocks, T]

    def present(self) -> dict[str, Any]:
        """Those that there are, by name."""
        return {name: array for name, array in self._asdict().items() if array is not None}


class Scratch(NamedTuple):
    """VMEM and SMEM that outlive a program. A slot `[tier, TAIL or HOLE]` is a page; heads take
    turns with two rows of ids.
    """

    pages: tuple[Any, ...]  # of each tier: int32 [2, blocks, rows of a column, T], pages as columns
    fresh: tuple[Any, ...]  # int32 [rows of a column, T] a tier, columns to be appended
    fallen: Any  # int32 [rows of a column of tier 0, T], columns that will be requantised
    arriving: Pool  # [tiers, 3, ...] pages as they lie in the pool
    departing: Pool  # [tiers, 2, ...]
    arrived: Any  # semaphores [tiers, 3]
    departed: Any  # semaphores [tiers, 2]
    table: Any  # int32 [2, 1, max_pages] in SMEM, as all that follows: page ids of the head
    free: Any  # int32 [2, 1, max_pages] free pages of the head, a stack
    holed: Any  # int32 [max_pages] pages of the tier at hand that have holes
    free_count: Any  # [1]
    length: Any  # [tiers] tokens
    owned: Any  # [tiers] pages
    held: Any  # [tiers] which page is in TAIL, -1 for none
    dirty: Any  # [tiers] whether it differs from the pool
    asked: Any  # [tiers, 2] which page is on its way to TAIL or HOLE, -1 for none
    sending: Any  # [tiers, 2] whether a copy to the pool is under way
    returning: Any  # [2, 2] whether a row of `table` or of `free` is
    row_arrived: Any  # semaphore
    row_returned: Any  # semaphores [2, 2]
    token_data: tuple[Any, ...]  # for the scan of significance and positions

    @staticmethod
    def shapes(plan: Plan) -> "Scratch":
        """What the kernel is to allocate."""
        layout, tiers, lanes = plan.layout, plan.layout.tiers, plan.layout.tokens
        columns = [Columns.of(layout, tier) for tier in range(tiers)]
        blocks = layout.token_data_rows

        def staging(slots: int) -> Pool:
            def array(rows: int, dtype):
                return pltpu.VMEM((tiers, slots, rows, lanes), dtype) if rows else None

            return Pool(
                array(layout.rows, jnp.uint8),
                array(blocks, jnp.dtype(layout.position_dtype)),
                array(layout.meta_rows, jnp.int16),
                array(blocks if layout.scored else 0, jnp.float32),
            )

        def scalars(*shape: int):
            return pltpu.SMEM(shape, jnp.int32)

        return Scratch(
            pages=tuple(
                pltpu.VMEM((2, n, c.rows, lanes), jnp.int32)
                for n, c in zip(layout.blocks, columns, strict=True)
            ),
            fresh=tuple(pltpu.VMEM((c.rows, lanes), jnp.int32) for c in columns),
            fallen=pltpu.VMEM((columns[0].rows, lanes), jnp.int32),
            arriving=staging(3),
            departing=staging(2),
            arrived=pltpu.SemaphoreType.DMA((tiers, 3)),
            departed=pltpu.SemaphoreType.DMA((tiers, 2)),
            table=scalars(2, 1, plan.max_pages),
            free=scalars(2, 1, plan.max_pages),
            holed=scalars(plan.max_pages),
            free_count=scalars(1),
            length=scalars(tiers),
            owned=scalars(tiers),
            held=scalars(tiers),
            dirty=scalars(tiers),
            asked=scalars(tiers, 2),
            sending=scalars(tiers, 2),
            returning=scalars(2, 2),
            row_arrived=pltpu.SemaphoreType.DMA,
            row_returned=pltpu.SemaphoreType.DMA((2, 2)),
            token_data=tuple(TokenData.scratch(layout, plan.scan)) if layout.scored else (),
        )


class Tier:
    """One tier of the head at hand; a page beyond `owned` has no place in the pool yet."""

    def __init__(self, plan: Plan, pool: Pool, scratch: Scratch, tier: int, row: Array):
        self.plan, self.pool, self.s, self.tier, self.row = plan, pool, scratch, tier, row
        self.layout, self.columns = plan.layout, Columns.of(plan.layout, tier)
        self.blocks, self.per_page = plan.layout.blocks[tier], plan.layout.tokens_per_page(tier)
        self.pages, self.fresh = scratch.pages[tier], scratch.fresh[tier]

    def page_id(self, page):
        """Where in the pool a page lies."""
        return self.s.table[self.row, 0, page_column(self.tier, page, self.plan.max_pages)]

    def ask(self, page, slot: int) -> None:
        """Let a page come to TAIL or HOLE, which `load` will want next."""
        for copy in self._arrivals(self.page_id(page), slot):
            copy.start()
        self.s.asked[self.tier, slot] = page

    def forget(self, slot: int) -> None:
        """The page that was asked for is not wanted."""

        @pl.when(self.s.asked[self.tier, slot] >= 0)
        def _():
            for copy in self._arrivals(0, slot):
                copy.wait()
            self.s.asked[self.tier, slot] = -1

    def load(self, page, slot: int) -> None:
        """Bring a page to TAIL or HOLE."""

        @pl.when(self.s.asked[self.tier, slot] != page)
        def _():
            self.forget(slot)
            self.ask(page, slot)

        self.forget(slot)
        self._widen(slot, slot)

    def ask_next(self, page_id) -> None:
        """Let the tail page of the next head come."""
        for copy in self._arrivals(page_id, NEXT):
            copy.start()

    def take_next(self, page) -> None:
        """Make the page that `ask_next` of the head before asked for TAIL."""
        for copy in self._arrivals(0, NEXT):
            copy.wait()
        self._widen(NEXT, TAIL)
        self.s.held[self.tier] = page

    def store(self, page, slot: int) -> None:
        """Send TAIL or HOLE to a page."""
        self.await_store(slot)
        self._narrow(slot)
        for copy in self._departures(self.page_id(page), slot):
            copy.start()
        self.s.sending[self.tier, slot] = 1

    def await_store(self, slot: int) -> None:
        """Wait until the last `store` of TAIL or HOLE is done."""

        @pl.when(self.s.sending[self.tier, slot] > 0)
        def _():
            for copy in self._departures(0, slot):
                copy.wait()
            self.s.sending[self.tier, slot] = 0

    def open_tail(self, page) -> None:
        """Make TAIL the page, which is the last one or the one after it."""

        @pl.when(self.s.held[self.tier] != page)
        def _():
            pl.when(page < self.s.owned[self.tier])(lambda: self.load(page, TAIL))
            self.s.held[self.tier], self.s.dirty[self.tier] = page, 0

    def close_tail(self) -> None:
        """Send TAIL to the pool if it has changed; a page without a place takes a free one."""
        page = self.s.held[self.tier]

        @pl.when((page >= 0) & (self.s.dirty[self.tier] > 0))
        def _():
            @pl.when(page >= self.s.owned[self.tier])
            def _():
                self.s.free_count[0] -= 1
                page_id = self.s.free[self.row, 0, self.s.free_count[0]]
                column = page_column(self.tier, page, self.plan.max_pages)
                self.s.table[self.row, 0, column] = page_id
                self.s.owned[self.tier] += 1

            self.store(page, TAIL)

        self.s.held[self.tier] = -1

    def free_tail(self) -> None:
        """TAIL is the last page and holds no token any more."""
        page = self.s.held[self.tier]
        self.s.free[self.row, 0, self.s.free_count[0]] = self.page_id(page)
        self.s.free_count[0] += 1
        column = page_column(self.tier, page, self.plan.max_pages)
        self.s.table[self.row, 0, column] = self.plan.num_pages
        self.s.owned[self.tier] -= 1
        self.s.held[self.tier] = -1

    def append(self, count) -> None:
        """Append the tokens whose columns are in `fresh`, each in the lane that its slot has."""
        before, lanes = self.s.length[self.tier], self.layout.tokens
        after = before + count

        @pl.loop(before // lanes, pl.cdiv(after, lanes))
        def _(block):
            self.open_tail(block // self.blocks)
            slot = block * lanes + lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
            at = self.pages.at[TAIL, lax.rem(block, self.blocks)]
            at[...] = jnp.where((slot >= before) & (slot < after), self.fresh[...], at[...])
            self.s.dirty[self.tier] = 1
            full = (lax.rem(block + 1, self.blocks) == 0) & ((block + 1) * lanes <= after)
            pl.when(full)(self.close_tail)

        self.s.length[self.tier] = after

    def _arrivals(self, page_id, slot: int) -> list:
        near, arrived = self.s.arriving.present(), self.s.arrived.at[self.tier, slot]
        return [
            pltpu.make_async_copy(far.at[page_id], near[name].at[self.tier, slot], arrived)
            for name, far in self.pool.present().items()
        ]

    def _departures(self, page_id, slot: int) -> list:
        near, departed = self.s.departing.present(), self.s.departed.at[self.tier, slot]
        return [
            pltpu.make_async_copy(near[name].at[self.tier, slot], far.at[page_id], departed)
            for name, far in self.pool.present().items()
        ]

    def _parts(self) -> list[tuple[str, int, int, int]]:
        """(array, its first row, the column's, rows) of each part; block b is `b * rows` on."""
        fmt, c = self.layout.formats[self.tier], self.columns
        start, meta_start = self.layout.value_start(self.tier)
        k_rows, v_rows = fmt.rows(self.layout.head_dim)
        parts = (
            ("payload", 0, c.payload[0], k_rows),
            ("payload", start, c.payload[1], v_rows),
            ("meta", 0, c.meta[0], fmt.key.meta_rows),
            ("meta", meta_start, c.meta[1], fmt.value.meta_rows),
            ("significance", 0, c.significance, int(self.layout.scored)),
            ("position", 0, c.position, 1),
        )
        return [part for part in parts if part[3]]

    def _widen(self, source: int, slot: int) -> None:
        """What has arrived, as it lies in the pool, to the columns of TAIL or HOLE."""
        arriving = self.s.arriving.present()
        words = {name: _to_words(x[self.tier, source]) for name, x in arriving.items()}
        for block in range(self.blocks):
            for name, first, row, rows in self._parts():
                start = first + block * rows
                self.pages[slot, block, row : row + rows] = words[name][start : start + rows]

    def _narrow(self, slot: int) -> None:
        """Columns to arrays as they lie in the pool; rows that the tier does not use become 0."""
        for name, buffer in self.s.departing.present().items():
            rows = [
                self.pages[slot, block, row : row + count]
                for part, _, row, count in self._parts()
                if part == name
                for block in range(self.blocks)
            ]
            unused = buffer.shape[2] - sum(x.shape[0] for x in rows)
            rows += [jnp.zeros((unused, self.layout.tokens), jnp.int32)] if unused else []
            words = jnp.concatenate(rows, axis=0)
            if buffer.dtype == jnp.float32:
                buffer[self.tier, slot] = lax.bitcast_convert_type(words, jnp.float32)
            else:
                buffer[self.tier, slot] = words.astype(buffer.dtype)


def _to_words(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.float32 else x.astype(jnp.int32)
