"""Removal of a tier's victims on TPU: the last tokens fill the holes, the fallen go a tier down."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from .mosaic_tpu_columns import (
    as_column,
    as_row,
    count_above,
    count_below,
    move_columns,
    one_hot,
    requantise,
)
from .mosaic_tpu_head import Head
from .mosaic_tpu_pages import HOLE, TAIL, Tier


class At(NamedTuple):
    """Where the removal of a tier's victims stands."""

    top: Array  # slots from here on are cleared
    hole_page: Array  # how many pages of `holed` are done
    hole: Array  # holes before this slot are filled


def remove(head: Head, tier: Tier) -> None:
    """Clear a tier's top slots: survivors fill the holes below, fallen victims go down a tier."""
    t, length = tier.tier, head.s.length[tier.tier]
    total = head.number("dropped", t) + (head.number("demoted") if t == 0 else 0)

    @pl.when(total > 0)
    def _():
        stop = length - total
        holed = head.find_holes(t, stop)
        _ask_below(tier, (length - 1) // tier.per_page, stop)
        start = At(length, jnp.int32(0), _open_hole(head, tier, 0, holed, stop))
        body = _removal_step(head, tier, stop, holed)
        end = lax.while_loop(lambda at: at.top > stop, body, start)
        pl.when(end.hole_page < holed)(lambda: _close_hole(head, tier, end.hole_page))
        tier.forget(TAIL)
        tier.forget(HOLE)
        head.s.length[t] = stop


def _open_hole(head: Head, tier: Tier, index, holed, stop) -> Array:
    """Bring page `index` of `holed` to HOLE unless in TAIL; its first slot, `stop` without one."""
    page, held = _holed(head, index), head.s.held[tier.tier]

    @pl.when((index < holed) & (page != held))
    def _():
        tier.load(page, HOLE)
        after = _holed(head, index + 1)
        pl.when((index + 1 < holed) & (after != held))(lambda: tier.ask(after, HOLE))

    return jnp.where(index < holed, page * tier.per_page, stop)


def _holed(head: Head, index) -> Array:
    """Page number `index` of `holed`; any where there is none."""
    return head.s.holed[jnp.minimum(index, head.plan.max_pages - 1)]


def _close_hole(head: Head, tier: Tier, index) -> None:
    """Send the page back to the pool; TAIL is sent later."""
    page = head.s.holed[index]
    pl.when(page != head.s.held[tier.tier])(lambda: tier.store(page, HOLE))


def _open_top(head: Head, tier: Tier, page, at: At, stop, holed) -> None:
    """Make TAIL the page of the top slot; it may be in HOLE, or have been and be on its way back.
    Ask for the next one.
    """
    s, t = head.s, tier.tier

    @pl.when(s.held[t] != page)
    def _():
        in_hole = (at.hole_page < holed) & (_holed(head, at.hole_page) == page)

        @pl.when(in_hole)
        def _():
            tier.pages[TAIL] = tier.pages[HOLE]

        @pl.when(~in_hole)
        def _():
            tier.await_store(HOLE)
            tier.load(page, TAIL)

        s.held[t], s.dirty[t] = page, jnp.where(in_hole, 1, 0)
        _ask_below(tier, page, stop)


def _ask_below(tier: Tier, page, stop) -> None:
    """Let the page below come to TAIL next, unless it may have holes."""
    pl.when((page - 1) * tier.per_page >= stop)(lambda: tier.ask(page - 1, TAIL))


def _removal_step(head: Head, tier: Tier, stop, holed):
    """The body of the loop over top slots: a block of them and a block of holes, to both ends."""
    layout, s, t, lanes = head.layout, head.s, tier.tier, head.layout.tokens

    def body(at: At) -> At:
        top_block = (at.top - 1) // lanes
        page = top_block // tier.blocks
        _open_top(head, tier, page, at, stop, holed)
        hole_block = at.hole // lanes
        in_hole = (at.hole_page < holed) & (_holed(head, at.hole_page) != s.held[t])
        slot = jnp.where(in_hole, HOLE, TAIL)
        above = tier.pages.at[TAIL, lax.rem(top_block, tier.blocks)]
        below = tier.pages.at[slot, lax.rem(hole_block, tier.blocks)]
        step = _match(head, t, above, below, at, stop, at.hole_page >= holed)

        if t == 0 and layout.tiers == 2:

            @pl.when(step.fallen > 0)
            def _():
                _requantise_fallen(head, above, below, step)

        @pl.when(step.filled > 0)
        def _():
            values, words = move_columns(tier.columns, above, _matrix(step.pairs))
            end, here = tier.columns.bytes_end, step.fill > 0
            below[:end] = jnp.where(here, values, below[:end])
            below[end:] = jnp.where(here, words, below[end:])
            pl.when(slot == TAIL)(lambda: s.dirty.__setitem__(t, 1))

        top = at.top - step.cleared
        pl.when(top == page * tier.per_page)(tier.free_tail)
        if t == 0 and layout.tiers == 2:
            pl.when(step.fallen > 0)(lambda: head.tiers[1].append(step.fallen))
        return _next_hole(head, tier, At(top, at.hole_page, at.hole), step, stop, holed)

    return body


def _next_hole(head: Head, tier: Tier, at: At, step: "Step", stop, holed) -> At:
    """Pass over the holes that are filled, to the next page where all of this one are."""
    lanes, block = head.layout.tokens, at.hole // head.layout.tokens
    all_filled, block_end = step.filled == step.holes, (block + 1) * lanes
    after = jnp.where(all_filled, block_end, jnp.maximum(at.hole, block * lanes + step.next_lane))
    page_done = (at.hole_page < holed) & (after > at.hole) & (lax.rem(after, tier.per_page) == 0)

    def turn():
        _close_hole(head, tier, at.hole_page)
        return At(at.top, at.hole_page + 1, _open_hole(head, tier, at.hole_page + 1, holed, stop))

    def stay():
        return At(at.top, at.hole_page, jnp.where(at.hole_page < holed, after, stop))

    return lax.cond(page_done, turn, stay)


class Step(NamedTuple):
    """What a step does: int32 0 or 1, sublane = lane of the top block, lane = that of the holes."""

    pairs: Array  # [T, T] which top token goes to which hole
    fill: Array  # [1, T] holes that are filled
    top_falls: Array  # [T, 1] victims of the top block that fall
    hole_falls: Array  # [1, T] filled holes whose victim falls
    lane: Array  # [T, 1] of each top slot cleared with a victim that falls, the lane that it gets
    cleared: Array  # how many top slots
    holes: Array  # how many holes there were
    filled: Array  # how many are filled
    fallen: Array  # how many victims fall
    next_lane: Array  # the lane after the last filled hole


def _match(head: Head, tier: int, above: Any, below: Any, at: At, stop, no_hole) -> Step:
    """Pair survivors of the top block, from the top, with holes of the other, from the bottom."""
    lanes = head.layout.tokens
    lane = lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
    top_slot, hole_slot = (at.top - 1) // lanes * lanes + lane, at.hole // lanes * lanes + lane
    active = jnp.where((top_slot >= stop) & (top_slot < at.top), 1, 0)
    victim, low = (x * active for x in head.leaving(tier, above, top_slot))
    hole, hole_low = (
        jnp.where((hole_slot >= at.hole) & (hole_slot < stop), x, 0)
        for x in head.leaving(tier, below, hole_slot)
    )
    survivor, holes = active - victim, jnp.sum(hole)

    rank, survives = count_above(survivor), as_column(survivor)
    reached = jnp.where((rank + survives <= holes) | no_hole, as_column(active), 0)
    hole_rank = as_row(count_below(hole))
    pairs = survives * reached * hole * jnp.where(rank == hole_rank, 1, 0)
    fill = pairs.sum(axis=0, keepdims=True)

    top_falls = as_column(low) * reached
    falls = top_falls + (pairs * hole_low).sum(axis=1, keepdims=True)
    last = head.layout.tiers - 1
    return Step(
        pairs=pairs,
        fill=fill,
        top_falls=top_falls,
        hole_falls=fill * hole_low,
        lane=lax.rem(head.s.length[last] + count_above(as_row(falls)), lanes),
        cleared=jnp.sum(reached),
        holes=holes,
        filled=jnp.sum(fill),
        fallen=jnp.sum(falls),
        next_lane=jnp.max(jnp.where(fill > 0, lane + 1, 0)),
    )


def _requantise_fallen(head: Head, above: Any, below: Any, step: Step) -> None:
    """Columns of both blocks' falling victims, requantised, to their lanes of `fresh` of tier 1."""
    columns, lanes, fallen = head.tiers[0].columns, head.layout.tokens, head.s.fallen
    from_top = one_hot(step.top_falls > 0, step.lane, lanes)
    falling = _matrix(step.pairs * step.hole_falls)
    lane = one_hot(step.lane >= 0, step.lane, lanes)
    dims = (((0,), (0,)), ((), ()))
    from_hole = lax.dot_general(falling, lane, dims, preferred_element_type=jnp.float32)
    from_hole = from_hole.astype(jnp.bfloat16)
    top, hole = move_columns(columns, above, from_top), move_columns(columns, below, from_hole)
    fallen[: columns.bytes_end], fallen[columns.bytes_end :] = (
        a | b for a, b in zip(top, hole, strict=True)
    )
    requantise(head.layout, fallen, head.tiers[1].fresh)


def _matrix(mask: Array) -> Array:
    return mask.astype(jnp.float32).astype(jnp.bfloat16)
