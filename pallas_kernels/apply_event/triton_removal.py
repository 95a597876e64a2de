"""Tokens out of a tier of one head, on GPUs: the last fill the holes, the demoted go down."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from ..plan_event.triton import Judge, Slots, read_token_data
from .triton_columns import copy, demoted, write
from .triton_head import Head


class Round(NamedTuple):
    """What one round does; `[width]`, in the order of the top slots from the tier's tail on."""

    source: Slots  # top slots of tokens that stay
    target: Slots  # the holes that they fill
    removed: Slots  # tokens that leave: a top slot, else the hole that its token fills
    search: Array  # int32 [] slot from which on the next holes are


def remove(head: Head, judge: Judge, tier: int, lengths: tuple) -> tuple:
    """Remove the tokens that leave a tier, a page of tier 0 a round; the tiers' lengths after.

    A round only reads the top slots, which end at `kept`, and only writes holes, which lie below:
    who leaves is always decided from what was there before the event, or from a token that filled a
    hole and stays. Full rounds free one page of tier 0 and need at most one for tier 1, whose pages
    hold no fewer tokens: the head's pages suffice.
    """
    total, length = head.inputs.leaving[head.index, tier], lengths[tier]
    width, pool = head.layout.tokens_per_page(0), head.state.pool
    kept = length - total
    falls_too = tier == 0 and len(lengths) == 2

    def one_round(state):
        cleared, search, lengths = state
        this = _plan(head, judge, tier, length - cleared, kept, search)
        columns = falls = None
        if falls_too:
            data = read_token_data(pool.significance, pool.position, this.removed)
            falls = this.removed.valid & judge.leaving(judge.mean(*data), tier)[1]
            columns = demoted(pool, head.layout, tier, _only(head, this.removed, falls), *data)
        head.barrier()  # the demoted have been read: their slots may be filled
        copy(pool, head.layout, tier, this.source, this.target)
        left = jnp.maximum(length - cleared - width, kept)
        lengths = tuple(left if t == tier else n for t, n in enumerate(lengths))
        head.barrier()  # the top slots have been read: their page may be taken
        if columns is not None and falls is not None:
            lengths = _append_demoted(head, lengths, columns, falls)
            head.barrier()
        return cleared + width, this.search, lengths

    start = (jnp.int32(0), jnp.int32(0), lengths)
    after = lax.while_loop(lambda state: state[0] < total, one_round, start)[2]
    if tier == 1:
        head.resize_low(lengths, after)
    return after


def _append_demoted(head: Head, lengths: tuple, columns, falls: Array) -> tuple:
    """Put requantised tokens where `falls [width]` at the tail of tier 1; the lengths after."""
    rank = jnp.cumsum(falls.astype(jnp.int32)) - 1
    grown = (lengths[0], lengths[1] + falls.astype(jnp.int32).sum())
    head.resize_low(lengths, grown)
    write(head.state.pool, head.layout, 1, head.locate(1, lengths[1] + rank, falls), columns)
    return grown


def _plan(head: Head, judge: Judge, tier: int, length, kept, search) -> Round:
    """The round that clears top slots of a tier of `length` tokens, of which `kept` stay."""
    nth = jnp.arange(head.blocks.width, dtype=jnp.int32)
    slot = length - 1 - nth
    active = (nth < head.layout.tokens_per_page(0)) & (slot >= kept)
    top = head.locate(tier, slot, active)
    leaves = _leaves(head, judge, tier, slot, top)
    stays = active & ~leaves
    rank = jnp.cumsum(stays.astype(jnp.int32)) - 1
    search = _list_holes(head, judge, tier, kept, search, stays.astype(jnp.int32).sum())
    at = head.state.holes.at[head.index, jnp.where(stays, rank, head.blocks.width)]
    hole = plgpu.load(at, mask=stays, other=0)
    removed = head.locate(tier, jnp.where(stays, hole, slot), active)
    return Round(_only(head, top, stays), _only(head, removed, stays), removed, search)


def _list_holes(head: Head, judge: Judge, tier: int, kept, search, count) -> Array:
    """Add the next `count` slots below `kept` whose tokens leave to the holes; where to go on.

    The search begins again where the last one ended; holes filled since then hold tokens that stay.
    """

    def unfinished(state):
        return (state[0] < count) & (state[1] < kept)

    def body(state):
        found, first = state
        slot = first + jnp.arange(head.blocks.scan, dtype=jnp.int32)
        leaves = _leaves(head, judge, tier, slot, head.locate(tier, slot, slot < kept))
        rank = found + jnp.cumsum(leaves.astype(jnp.int32)) - 1
        listed = leaves & (rank < count)
        at = head.state.holes.at[head.index, jnp.where(listed, rank, head.blocks.width)]
        plgpu.store(at, slot, mask=listed)
        found += leaves.astype(jnp.int32).sum()
        return found, jnp.where(found < count, first + head.blocks.scan, first)

    search = lax.while_loop(unfinished, body, (jnp.int32(0), search))[1]
    head.barrier()
    return search


def _leaves(head: Head, judge: Judge, tier: int, slot: Array, at: Slots) -> Array:
    """Mask of the tokens at `slot [n]` that leave the tier."""
    if head.one_victim:
        return at.valid & (slot == head.inputs.victim[head.index, tier])
    pool = head.state.pool
    mean = judge.mean(*read_token_data(pool.significance, pool.position, at))
    dropped, falls = judge.leaving(mean, tier)
    return at.valid & (dropped | falls)


def _only(head: Head, slots: Slots, valid: Array) -> Slots:
    """The slots that are also `valid [n]`."""
    return slots._replace(page=jnp.where(valid, slots.page, head.num_pages), valid=valid)
