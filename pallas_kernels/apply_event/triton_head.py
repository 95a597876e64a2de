"""What the parts of the event's kernel share: the Refs, the head at hand, and where its pages are.

The head's pages are all in its row of the page table: those of tier 0 from the left, right behind
them those that are free (granted or emptied), those of tier 1 from the right. A page that tier 0
gives up or takes so stays where it is; the lengths of the tiers say which is which. The row has
room: pages in use and free ones are together as many as before or after the event, whichever is
more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..pages import PageLayout
from ..plan_event.triton import Slots, locate
from .triton_columns import Pool

IDS = 32  # page ids moved at once


@dataclass(frozen=True)
class Blocks:
    """Sizes of one program of `apply_event`; powers of two."""

    width: int  # tokens removed at once, at least those of a page of tier 0
    scan: int  # slots searched at once for tokens that leave
    enter: int  # entering tokens encoded at once
    warps: int

    @staticmethod
    def choose(layout: PageLayout) -> "Blocks":
        """The defaults."""
        width = pl.next_power_of_2(layout.tokens_per_page(0))
        return Blocks(width=width, scan=256, enter=32, warps=4 if width < 128 else 8)


class Inputs(NamedTuple):
    """The Refs that the kernel reads."""

    tau: Any  # float32 [B, 2]
    query_spans: Any  # int32 [B, spans, 2]
    admitted: Any  # int32 [B]
    leaving: Any  # int32 [B, tiers] tokens that leave each tier
    victim: Any  # int32 [B, tiers] with `one_victim` the slot of the one that leaves
    arriving: Any  # int32 [B, tiers] entering tokens of each tier
    granted: Any  # int32 [B] pages from the ring
    take: Any  # int32 [B] where in the ring they begin (not reduced to its size)
    give: Any  # int32 [B] where in the ring the pages that the head gives up begin (not reduced)
    entering: Any  # int32 [B, n]
    k: Any  # float [B, >= n, head_dim]
    v: Any  # float [B, >= n, head_dim]
    significance: Any  # float32 [B, >= n]
    position: Any  # int32 [B, >= n]


class State(NamedTuple):
    """The Refs of what the kernel changes in place, and a list to work with."""

    pool: Pool
    page_table: Any  # int32 [B, max_pages]
    tier_len: Any  # int32 [B, tiers]
    ring_ids: Any  # int32 [num_pages]
    holes: Any  # int32 [B, width] slots of tokens that leave, lowest first


def pages_of(layout: PageLayout, lengths: tuple) -> list:
    """Pages that tiers of `lengths` (scalars) take."""
    pairs = zip(lengths, map(layout.tokens_per_page, range(len(lengths))), strict=True)
    return [lax.div(n + per_page - 1, jnp.int32(per_page)) for n, per_page in pairs]


@dataclass(frozen=True)
class Head:
    """The head of one program."""

    inputs: Inputs
    state: State
    layout: PageLayout
    blocks: Blocks
    one_victim: bool
    barrier: Callable[[], None]  # what the program wrote so far may be read by all its threads
    index: Any  # int32 []
    held: Any  # int32 [] pages of the head, free ones included

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        return self.state.ring_ids.shape[0]

    def locate(self, tier: int, slot: Array, valid: Array) -> Slots:
        """Slots number `slot [n]` of a tier."""
        return locate(
            self.state.page_table, self.num_pages, self.layout, tier, self.index, slot, valid
        )

    def resize_low(self, before: tuple, after: tuple) -> None:
        """Give up or take pages of tier 1, whose length alone differs; ends with a barrier.

        Its ids and the free ones move at the facing ends of the two ranges: no id is overwritten
        before it has been read, because pages given up move left from the lowest column on, and
        pages taken move right from the highest on.
        """
        old, new = (pages_of(self.layout, lengths)[1] for lengths in (before, after))
        free_end, low_end = self.held - old, self.state.page_table.shape[1] - old
        self._move_ids(low_end, free_end, 1, old - new)
        self._move_ids(free_end - 1, low_end - 1, -1, new - old)

    def take_granted(self, lengths: tuple) -> None:
        """Put the pages that the ring grants behind those of tier 0; ends with a barrier."""
        first, count = pages_of(self.layout, lengths)[0], self.inputs.granted[self.index]

        def body(step, _):
            nth = step * IDS + jnp.arange(IDS, dtype=jnp.int32)
            at = self._ring_at(self.inputs.take[self.index] + nth, nth < count)
            ids = plgpu.load(self.state.ring_ids.at[at], mask=nth < count, other=0)
            plgpu.store(self._row(first + nth, nth < count), ids, mask=nth < count)

        lax.fori_loop(0, pl.cdiv(count, IDS), body, None)
        self.barrier()

    def give_back(self, lengths: tuple) -> None:
        """Return the free pages to the ring; the columns that no tier uses get `num_pages`."""
        high, low = (*pages_of(self.layout, lengths), jnp.int32(0))[:2]
        free, unused = self.held - high - low, self.state.page_table.shape[1] - high - low

        def body(step, _):
            nth = step * IDS + jnp.arange(IDS, dtype=jnp.int32)
            ids = plgpu.load(self._row(high + nth, nth < free), mask=nth < free, other=0)
            at = self._ring_at(self.inputs.give[self.index] + nth, nth < free)
            plgpu.store(self.state.ring_ids.at[at], ids, mask=nth < free)
            self.barrier()
            row = self._row(high + nth, nth < unused)
            nowhere = jnp.full((IDS,), self.num_pages, jnp.int32)
            plgpu.store(row, nowhere, mask=nth < unused)

        lax.fori_loop(0, pl.cdiv(unused, IDS), body, None)

    def _move_ids(self, source, target, step: int, count) -> None:
        """Copy `count` table entries (none if negative) from `source` to `target`, step 1 or -1."""

        def body(chunk, _):
            nth = chunk * IDS + jnp.arange(IDS, dtype=jnp.int32)
            ids = plgpu.load(self._row(source + step * nth, nth < count), mask=nth < count, other=0)
            self.barrier()
            plgpu.store(self._row(target + step * nth, nth < count), ids, mask=nth < count)
            self.barrier()

        lax.fori_loop(0, pl.cdiv(jnp.maximum(count, 0), IDS), body, None)

    def _row(self, column: Array, valid: Array):
        max_pages = self.state.page_table.shape[1]
        return self.state.page_table.at[self.index, jnp.where(valid, column, max_pages)]

    def _ring_at(self, place: Array, valid: Array) -> Array:
        return jnp.where(valid, lax.rem(place, jnp.int32(self.num_pages)), self.num_pages)
