"""The TPU kernel of the compression event: what one program does for one head."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .mosaic_tpu_columns import as_column, count_below, encode, move, one_hot
from .mosaic_tpu_head import Head, Inputs, Outputs
from .mosaic_tpu_pages import HOLE, TAIL, Plan, Tier
from .mosaic_tpu_removal import remove


def carry_out(*refs, plan: Plan) -> None:
    """One head and one tile of its entering tokens; the program of the first tile also removes what leaves the tiers.

    DiffKV, arXiv 2412.03131 sec. 5.2 and 5.3. Reads significance and positions of the live pages of tiers that lose tokens (unless
    `one_victim`), and whole pages: those with holes, those at the tails. Writes those whole. Bytes of a page:
    T (rows + 2 meta_rows + blocks * (4 + position bytes)).
    """
    inputs, outputs = len(Inputs._fields), len(Outputs._fields)
    x, out, (s,) = Inputs(*refs[:inputs]), Outputs(*refs[inputs : inputs + outputs]), refs[inputs + outputs :]
    head = Head(plan, x, out, s)
    first, last = pl.program_id(1) == 0, pl.program_id(1) == pl.num_programs(1) - 1
    begin, end = (head.index == 0) & first, (head.index == pl.num_programs(0) - 1) & last

    @pl.when(begin)
    def _():
        for tier in head.tiers:
            for slot in (TAIL, HOLE):
                s.sending[tier.tier, slot] = 0

    @pl.when(head.number("busy") > 0)
    def _():
        pl.when(first)(lambda: _open(head, out.table))
        if plan.layout.scored:
            for tier in reversed(head.tiers):
                pl.when(first)(lambda tier=tier: remove(head, tier))
        for tier in head.tiers:
            _enter(head, tier)
        pl.when(last)(lambda: _close(head, out))

    @pl.when(end)
    def _():
        for tier in head.tiers:
            for slot in (TAIL, HOLE):
                tier.await_store(slot)


def _open(head: Head, table: Any) -> None:
    """Fetch the table row; the pages granted are free."""
    s = head.s
    copy = pltpu.make_async_copy(table.at[head.index], s.table, s.semaphore)
    copy.start()
    s.free_count[0] = head.number("extra")

    @pl.loop(0, head.number("extra"))
    def _(i):
        s.free[0, i] = head.x.numbers[0, head.plan.numbers["granted"].start + i]

    for tier in head.tiers:
        s.length[tier.tier] = head.number("length", tier.tier)
        s.owned[tier.tier] = head.layout.pages_for(tier.tier, head.number("length", tier.tier))
        s.held[tier.tier] = -1
        s.dirty[tier.tier] = 0
    copy.wait()


def _close(head: Head, out: Outputs) -> None:
    """Write the tail pages, the table row and the pages left over."""
    for tier in head.tiers:
        tier.close_tail()
    s = head.s
    ids = ((s.table, out.table), (s.free, out.surplus))
    copies = [pltpu.make_async_copy(near, far.at[head.index], s.semaphore) for near, far in ids]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


def _enter(head: Head, tier: Tier) -> None:
    """Encode and append those tokens of the tile that enter a tier."""
    enters = jnp.where(head.x.side[0:1] == tier.tier + 1, 1, 0)
    count = jnp.sum(enters)

    @pl.when(count > 0)
    def _():
        lanes = head.layout.tokens
        lane = lax.rem(head.s.length[tier.tier] + count_below(enters), lanes)
        to = one_hot(as_column(enters) > 0, lane, lanes)
        k, v = (_as_lanes(x[...], to) for x in (head.x.k, head.x.v))
        encode(head.layout, tier.tier, k, v, tier.fresh)
        side = move(head.x.side[...], to, 4)
        first = 1 if head.layout.scored else 2
        tier.fresh[tier.columns.meta_end :] = side[first:]
        tier.append(count)


def _as_lanes(x: Array, to: Array) -> Array:
    """Tokens `[W, d]` as float32 `[d, T]`, those that `to [W, T]` places."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    words = move(bits >> 16, to, 2, contract=0) << 16 if x.dtype == jnp.bfloat16 else move(bits, to, 4, contract=0)
    return lax.bitcast_convert_type(words, jnp.float32)
