"""Gather and scatter of single tokens (one lane of a page) and of whole pages, on all arrays."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..codecs import Block
from ..pages import PageLayout, Pages, tier_page_ids


class Slots(NamedTuple):
    """Where tokens of one tier lie: page id, block in the page and lane, equal shapes `[...]`."""

    page: Array
    block: Array
    lane: Array


def locate(
    layout: PageLayout, page_table: Array, tier: int, slot: Array, valid: Array, num_pages: int
) -> Slots:
    """Slots of tokens number `slot [B, n]` of a tier; page `num_pages` (nowhere) where not `valid`.
    `page_table [B, max_pages]`.
    """
    per_page = layout.tokens_per_page(tier)
    max_pages = page_table.shape[-1]
    index = jnp.clip(slot // per_page, 0, max_pages - 1)
    page = jnp.take_along_axis(tier_page_ids(page_table, tier, 0, max_pages), index, axis=-1)
    within = slot % per_page
    return Slots(jnp.where(valid, page, num_pages), within // layout.tokens, within % layout.tokens)


def read_tokens(
    pages: Pages, layout: PageLayout, tier: int, slots: Slots
) -> tuple[Block, Array, Array]:
    """Tokens at `slots [...]`: one-token columns `[..., rows]`, significance, position `[...]`."""
    parts = _parts(pages, layout, tier, slots)
    columns = [_read_column(array, slots, first, rows) for array, first, rows in parts]
    halves = [lax.bitcast_convert_type(column, jnp.float16) for column in columns[2:]]
    significance = _read_array(pages.significance, slots)
    return Block(*columns[:2], *halves), significance, _read_array(pages.position, slots)


def write_tokens(
    pages: Pages, layout: PageLayout, tier: int, slots: Slots, tokens: tuple[Block, Array, Array]
) -> Pages:
    """Put tokens as returned by `read_tokens` at `slots`; those on page `num_pages` are dropped."""
    block, significance, position = tokens
    bits = partial(lax.bitcast_convert_type, new_dtype=pages.meta.dtype)
    k_payload, v_payload, k_meta, v_meta = _parts(pages, layout, tier, slots)
    payload = _write_column(pages.payload, slots, k_payload[1], block.k_payload)
    meta = _write_column(pages.meta, slots, k_meta[1], bits(block.k_meta))
    return Pages(
        payload=_write_column(payload, slots, v_payload[1], block.v_payload),
        meta=_write_column(meta, slots, v_meta[1], bits(block.v_meta)),
        significance=_write_array(pages.significance, slots, significance),
        position=_write_array(pages.position, slots, position),
    )


def _parts(pages: Pages, layout: PageLayout, tier: int, slots: Slots):
    """(array, first row of the token's block, rows) of K and V payload, K and V metadata."""
    fmt, (v_start, v_meta_start) = layout.formats[tier], layout.value_start(tier)
    k_rows, v_rows = fmt.rows(layout.head_dim)
    k_meta, v_meta = fmt.key.meta_rows, fmt.value.meta_rows
    return (
        (pages.payload, slots.block * k_rows, k_rows),
        (pages.payload, v_start + slots.block * v_rows, v_rows),
        (pages.meta, slots.block * k_meta, k_meta),
        (pages.meta, v_meta_start + slots.block * v_meta, v_meta),
    )


def _read_column(array: Array, slots: Slots, first: Array, rows: int) -> Array:
    """`array [num_pages, all rows, T]` at page, `rows` rows from `first`, lane: `[..., rows]`."""
    if rows == 0:
        return jnp.zeros((*slots.page.shape, 0), array.dtype)
    dims = lax.GatherDimensionNumbers(
        offset_dims=(slots.page.ndim,), collapsed_slice_dims=(0, 2), start_index_map=(0, 1, 2)
    )
    index = jnp.stack([slots.page, first, slots.lane], axis=-1)
    return lax.gather(array, index, dims, (1, rows, 1), mode=lax.GatherScatterMode.CLIP)


def _write_column(array: Array, slots: Slots, first: Array, column: Array) -> Array:
    """Inverse of `_read_column`; slots on page `num_pages` are dropped."""
    if column.shape[-1] == 0:
        return array
    dims = lax.ScatterDimensionNumbers(
        update_window_dims=(slots.page.ndim,),
        inserted_window_dims=(0, 2),
        scatter_dims_to_operand_dims=(0, 1, 2),
    )
    index = jnp.stack([slots.page, first, slots.lane], axis=-1)
    return lax.scatter(array, index, column, dims, mode=lax.GatherScatterMode.FILL_OR_DROP)


def _read_array(array: Array, slots: Slots) -> Array:
    if array.shape[1] == 0:  # the policy does not score
        return jnp.zeros(slots.page.shape, array.dtype)
    return array.at[slots.page, slots.block, slots.lane].get(mode="clip")


def _write_array(array: Array, slots: Slots, values: Array) -> Array:
    if array.shape[1] == 0:
        return array
    at = array.at[slots.page, slots.block, slots.lane]
    return at.set(values.astype(array.dtype), mode="drop")


def ranked(cumulative: Array, rank: Array) -> Array:
    """Index of the `rank`-th (from 0) true element of each row of a mask, given its inclusive
    `cumulative [B, n]` sum, `rank [B, m]`.

    `n` where the row has fewer.
    """
    return jax.vmap(jnp.searchsorted)(cumulative, rank + 1)
