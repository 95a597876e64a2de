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
    """One head and one tile of its entering tokens; the first tile's program also removes.

    DiffKV, arXiv 2412.03131 sec. 5.2 and 5.3. Reads significance and positions of the live pages of
    tiers that lose tokens (unless `one_victim`), and whole pages: those with holes, those at the
    tails. Writes those whole. Bytes of a page: T (rows + 2 meta_rows + blocks * (4 + position
    bytes)).
    """
    inputs, outputs = len(Inputs._fields), len(Outputs._fields)
    x, out = Inputs(*refs[:inputs]), Outputs(*refs[inputs : inputs + outputs])
    (s,) = refs[inputs + outputs :]
    head = Head(plan, x, out, s)
    first, last = pl.program_id(1) == 0, pl.program_id(1) == pl.num_programs(1) - 1
    heads = pl.num_programs(0)
    begin, end = (head.index == 0) & first, (head.index == heads - 1) & last

    pl.when(begin)(lambda: _begin(head, out.table))
    pl.when(first)(lambda: _open(head, out, head.index + 1 < heads))

    @pl.when(head.number("busy") > 0)
    def _():
        if plan.layout.scored:
            for tier in reversed(head.tiers):
                pl.when(first)(lambda tier=tier: remove(head, tier))
        for tier in head.tiers:
            _enter(head, tier)
        pl.when(last)(lambda: _close(head, out))

    pl.when(end)(lambda: _end(head, out))


def _begin(head: Head, table: Any) -> None:
    """In the first program: nothing is under way but what the first head wants."""
    s = head.s
    for tier in head.tiers:
        for slot in (TAIL, HOLE):
            s.sending[tier.tier, slot], s.asked[tier.tier, slot] = 0, -1
    for row in range(2):
        for kind in range(2):
            s.returning[row, kind] = 0
    _ask(head, table, upcoming=False)


def _end(head: Head, out: Outputs) -> None:
    """In the last program: wait for all that is under way."""
    for tier in head.tiers:
        for slot in (TAIL, HOLE):
            tier.await_store(slot)
    for row in range(2):
        _await_row(head, out, row)


def _ask(head: Head, table: Any, *, upcoming: bool) -> None:
    """Let the table row of this or the next head, and its tail pages, come if it has work."""

    @pl.when(head.number("busy", upcoming=upcoming) > 0)
    def _():
        index, row = (head.index + 1, 1 - head.row) if upcoming else (head.index, head.row)
        pltpu.make_async_copy(table.at[index], head.s.table.at[row], head.s.row_arrived).start()
        for tier in head.tiers:
            page_id = head.number("tail", tier.tier, upcoming=upcoming)
            pl.when(page_id >= 0)(lambda tier=tier, page_id=page_id: tier.ask_next(page_id))


def _open(head: Head, out: Outputs, more: Array) -> None:
    """Take what was asked for, ask for what the next head wants; the pages granted are free."""
    s = head.s

    @pl.when(head.number("busy") > 0)
    def _():
        for tier in head.tiers:
            length, t = head.number("length", tier.tier), tier.tier
            s.length[t], s.owned[t] = length, head.layout.pages_for(t, length)
            s.held[t], s.dirty[t] = -1, 0
            pl.when(head.number("tail", t) >= 0)(
                lambda tier=tier, length=length: tier.take_next((length - 1) // tier.per_page)
            )
        pltpu.make_async_copy(out.table.at[0], s.table.at[head.row], s.row_arrived).wait()
        s.free_count[0] = head.number("extra")

        @pl.loop(0, head.number("extra"))
        def _(i):
            s.free[head.row, 0, i] = head.x.numbers[0, head.plan.numbers["granted"].start + i]

    @pl.when(more)
    def _():
        _await_row(head, out, 1 - head.row)
        _ask(head, out.table, upcoming=True)


def _close(head: Head, out: Outputs) -> None:
    """Send the tail pages, the table row and the pages left over."""
    for tier in head.tiers:
        tier.close_tail()
    for kind, copy in enumerate(_row_copies(head, out, head.index, head.row)):

        @pl.when((kind == 0) | (head.s.free_count[0] > 0))
        def _(kind=kind, copy=copy):
            copy.start()
            head.s.returning[head.row, kind] = 1


def _row_copies(head: Head, out: Outputs, index, row) -> list:
    """Copies of a row of the table and of a row of free pages to a head's place."""
    pairs = ((head.s.table, out.table), (head.s.free, out.surplus))
    return [
        pltpu.make_async_copy(near.at[row], far.at[index], head.s.row_returned.at[row, kind])
        for kind, (near, far) in enumerate(pairs)
    ]


def _await_row(head: Head, out: Outputs, row) -> None:
    """Wait until a row of ids has been sent."""
    for kind, copy in enumerate(_row_copies(head, out, 0, row)):

        @pl.when(head.s.returning[row, kind] > 0)
        def _(kind=kind, copy=copy):
            copy.wait()
            head.s.returning[row, kind] = 0


def _enter(head: Head, tier: Tier) -> None:
    """Encode and append those tokens of the tile that enter a tier."""
    enters = jnp.where(head.x.token_data[0:1] == tier.tier + 1, 1, 0)
    count = jnp.sum(enters)

    @pl.when(count > 0)
    def _():
        lanes = head.layout.tokens
        lane = lax.rem(head.s.length[tier.tier] + count_below(enters), lanes)
        to = one_hot(as_column(enters) > 0, lane, lanes)
        k, v = (_as_lanes(x[...], to) for x in (head.x.k, head.x.v))
        encode(head.layout, tier.tier, k, v, tier.fresh)
        token_data = move(head.x.token_data[...], to, 4)
        first = 1 if head.layout.scored else 2
        tier.fresh[tier.columns.meta_end :] = token_data[first:]
        tier.append(count)


def _as_lanes(x: Array, to: Array) -> Array:
    """Tokens `[W, d]` as float32 `[d, T]`, those that `to [W, T]` places."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    if x.dtype == jnp.bfloat16:
        words = move(bits >> 16, to, 2, contract=0) << 16
    else:
        words = move(bits, to, 4, contract=0)
    return lax.bitcast_convert_type(words, jnp.float32)
