"""Adding and removing tokens of all heads of a layer, in place, with pages of the ring."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..codecs import Block
from ..pages import PageLayout, Pages, tier_page_ids
from ..rope import at_positions
from .columns import locate, ranked, read_tokens, write_tokens
from .ring import FreeRing, grow, shrink


class Stored(NamedTuple):
    """The stored tokens of one layer: the shared pool and ring, and the table and lengths of its
    `B` heads (requests x KV heads). `KVCache.stored` is of all layers, with axes `[L, R, K]` in
    place of `[B]`.
    """

    pages: Pages
    ring: FreeRing
    page_table: Array  # int32 [B, max_pages]
    tier_len: Array  # int32 [B, tiers]


class Tokens(NamedTuple):
    """Exact tokens on their way into a tier."""

    k: Array  # [B, n, head_dim]
    v: Array  # [B, n, head_dim]
    significance: Array  # float32 [B, n]
    position: Array  # int32 [B, n]


def append_tokens(
    stored: Stored, layout: PageLayout, tier: int, tokens: Tokens, keep: Array
) -> Stored:
    """Encode tokens where `keep [B, n]` at the tail of a tier, in order; the pages are there."""
    if layout.rope is not None:
        tokens = tokens._replace(k=at_positions(tokens.k, tokens.position, layout.rope, back=True))
    cumulative = jnp.cumsum(keep, axis=-1)
    last = keep.shape[-1] - 1

    def fetch(rank):
        index = jnp.minimum(ranked(cumulative, rank), last)
        k = jnp.take_along_axis(tokens.k, index[..., None], axis=1)
        v = jnp.take_along_axis(tokens.v, index[..., None], axis=1)
        block = layout.formats[tier].encode(_lanes(k, layout, tier), _lanes(v, layout, tier))
        token_data = (tokens.significance, tokens.position)
        return (block, *(jnp.take_along_axis(x, index, axis=1) for x in token_data))

    return _append(stored, layout, tier, cumulative[:, -1], last + 1, fetch)


def remove_tokens(
    stored: Stored,
    layout: PageLayout,
    tier: int,
    victim: Array,
    demoted: Array | None = None,
    *,
    pages_a_round: int = 1,
) -> Stored:
    """Remove the tokens where `victim [B, capacity]` (slot order) from a tier; those also `demoted`
    are requantised into the next tier.

    Rounds of `pages_a_round` pages of the lowest tier (more for many victims, fewer for few): the
    top slots are cleared, their survivors fill the holes of lower victims, emptied pages are freed,
    then the demoted are appended. So a head never holds more than its pages before or after,
    whichever is more.

    A round writes what the round before it has read: reads and writes of the pool are then ordered
    by data, and XLA needs no copy of it.
    """
    width = pages_a_round * max(layout.tokens_per_page(t) for t in range(layout.tiers))
    cumulative = jnp.cumsum(victim, axis=-1)
    total, length = cumulative[:, -1], stored.tier_len[:, tier]

    def plan(cleared: Array) -> Round:
        nth = cleared + jnp.arange(width)
        active = nth < total[:, None]
        top = jnp.where(active, length[:, None] - 1 - nth, 0)
        top_is_victim = jnp.take_along_axis(victim, top, axis=1)
        victims_above = total[:, None] - jnp.take_along_axis(cumulative, top, axis=1)
        hole = jnp.minimum(ranked(cumulative, nth - victims_above), victim.shape[1] - 1)
        removed = jnp.where(top_is_victim, top, hole)
        if demoted is None:
            falls = jnp.zeros_like(active)
        else:
            falls = jnp.take_along_axis(demoted, removed, axis=1) & active
        moves = active & ~top_is_victim
        return Round(top, removed, moves, falls, jnp.clip(total - cleared, 0, width))

    def read(stored: Stored, cleared: Array):
        this = plan(cleared)
        at = partial(locate, layout, stored.page_table, tier, num_pages=stored.pages.num_pages)
        tokens = partial(read_tokens, stored.pages, layout, tier)
        movers = tokens(at(this.top, this.moves))
        return movers, None if demoted is None else tokens(at(this.removed, this.falls))

    def one_round(state):
        cleared, stored, (movers, falling) = state
        this = plan(cleared)
        stored = _clear(stored, layout, tier, this, movers)
        if falling is not None:
            stored = _append_demoted(stored, layout, tier, falling, this.falls)
        return cleared + width, stored, read(stored, cleared + width)

    cleared = jnp.int32(0)
    start = (cleared, stored, read(stored, cleared))
    return lax.while_loop(lambda state: jnp.any(state[0] < total), one_round, start)[1]


class Round(NamedTuple):
    """What one round of `remove_tokens` does to each head; `[B, width]` unless said."""

    top: Array  # slots that are cleared, the tail of the tier
    removed: Array  # slots of the victims: a top slot, else a hole below, which its token fills
    moves: Array  # whether the token of the top slot moves to `removed`
    falls: Array  # whether the victim is demoted
    cleared: Array  # int32 [B] how many top slots


def release_all(stored: Stored, layout: PageLayout, gone: Array) -> Stored:
    """Free every page of the heads where `gone [B]`."""
    ring, page_table, tier_len = stored.ring, stored.page_table, stored.tier_len
    for tier in range(layout.tiers):
        pages = jnp.where(gone, layout.pages_for(tier, tier_len[:, tier]), 0)
        none, most = jnp.zeros_like(pages), page_table.shape[1]
        ring, page_table = shrink(ring, page_table, tier, pages, none, most)
    return Stored(stored.pages, ring, page_table, jnp.where(gone[:, None], 0, tier_len))


def _clear(
    stored: Stored, layout: PageLayout, tier: int, this: Round, movers: tuple[Block, Array, Array]
) -> Stored:
    """Fill the holes with the survivors of the top slots, shorten the tier, free emptied pages."""
    width, num_pages = this.top.shape[1], stored.pages.num_pages
    holes = locate(layout, stored.page_table, tier, this.removed, this.moves, num_pages)
    written = write_tokens(stored.pages, layout, tier, holes, movers)
    before = stored.tier_len[:, tier]
    pages, fewer = (layout.pages_for(tier, n) for n in (before, before - this.cleared))
    most = -(-width // layout.tokens_per_page(tier)) + 1
    ring, page_table = shrink(stored.ring, stored.page_table, tier, pages, fewer, most)
    return Stored(written, ring, page_table, stored.tier_len.at[:, tier].add(-this.cleared))


def _append_demoted(
    stored: Stored,
    layout: PageLayout,
    tier: int,
    tokens: tuple[Block, Array, Array],
    leaving: Array,
) -> Stored:
    """Requantise `tokens [B, n]` (as `read_tokens` gives them) of a tier where `leaving`, and put
    them at the tail of the next one.
    """
    stored_block, *token_data = tokens
    cumulative = jnp.cumsum(leaving, axis=-1)
    last = leaving.shape[1] - 1

    def fetch(rank):
        index = jnp.minimum(ranked(cumulative, rank), last)
        columns = (jnp.take_along_axis(part, index[..., None], axis=1) for part in stored_block)
        lanes = Block(*(_lanes(part, layout, tier + 1) for part in columns))
        source, target = layout.formats[tier], layout.formats[tier + 1]
        block = source.demote(target, lanes)
        return (block, *(jnp.take_along_axis(x, index, axis=1) for x in token_data))

    return _append(stored, layout, tier + 1, cumulative[:, -1], last + 1, fetch)


def _append(
    stored: Stored, layout: PageLayout, tier: int, count: Array, most: int, fetch: Callable
) -> Stored:
    """Put `count [B] <= most` tokens at the tail of a tier.

    `fetch(rank [B, n])` gives the tokens of those ranks: encoded `[B, n / tokens_per_page, blocks,
    rows, T]`, significance and position `[B, n]`. Whole pages are read, changed and written: the
    tail page may be half full.
    """
    per_page = layout.tokens_per_page(tier)
    length = stored.tier_len[:, tier]
    touched = (most + 2 * per_page - 2) // per_page
    pages, more = (layout.pages_for(tier, n) for n in (length, length + count))
    ring, page_table = grow(stored.ring, stored.page_table, tier, pages, more, touched)
    rank = jnp.arange(touched * per_page) - (length % per_page)[:, None]
    valid = (rank >= 0) & (rank < count[:, None])
    tokens = fetch(jnp.maximum(rank, 0))
    fresh = valid.reshape(len(count), touched, layout.blocks[tier], layout.tokens)
    ids = tier_page_ids(page_table, tier, length // per_page, touched)
    ids = jnp.where(fresh.any(axis=(-1, -2)), ids, stored.pages.num_pages)
    written = _overlay(stored.pages, layout, tier, ids, fresh, tokens)
    return Stored(written, ring, page_table, stored.tier_len.at[:, tier].add(count))


def _overlay(
    pages: Pages,
    layout: PageLayout,
    tier: int,
    ids: Array,
    fresh: Array,
    tokens: tuple[Block, Array, Array],
) -> Pages:
    """Write the lanes `fresh [B, n, blocks, T]` of pages `ids [B, n]`."""
    block, significance, position = tokens
    payload, meta = (array.at[ids].get(mode="clip") for array in (pages.payload, pages.meta))
    old = layout.split(tier, payload, meta)
    merged = Block(
        *(jnp.where(fresh[..., None, :], new, kept) for new, kept in zip(block, old, strict=True))
    )
    payload, meta = layout.join(tier, merged, payload, meta)
    return Pages(
        payload=pages.payload.at[ids].set(payload, mode="drop"),
        meta=pages.meta.at[ids].set(meta, mode="drop"),
        significance=_overlay_array(pages.significance, ids, fresh, significance),
        position=_overlay_array(pages.position, ids, fresh, position),
    )


def _overlay_array(array: Array, ids: Array, fresh: Array, values: Array) -> Array:
    if array.shape[1] == 0:  # the policy does not score
        return array
    kept = array.at[ids].get(mode="clip")
    blocks = fresh.shape[2]
    new = jnp.where(fresh, values.reshape(fresh.shape).astype(array.dtype), kept[:, :, :blocks])
    return array.at[ids].set(jnp.concatenate([new, kept[:, :, blocks:]], axis=2), mode="drop")


def _lanes(x: Array, layout: PageLayout, tier: int) -> Array:
    """Tokens `[B, n, rows]` as blocks of a tier `[B, n / tokens_per_page, blocks, rows, T]`."""
    (b, n, rows), per_page = x.shape, layout.tokens_per_page(tier)
    x = x.reshape(b, n // per_page, layout.blocks[tier], layout.tokens, rows)
    return jnp.swapaxes(x, -1, -2)
