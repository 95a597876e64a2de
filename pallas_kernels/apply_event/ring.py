"""The free-page ring: many claimants at once by prefix sums (arXiv 2412.03131 sec. 5.2-5.3)."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from ..pages import page_column, tier_page_ids


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "start", "count"], meta_fields=[])
@dataclass(frozen=True)
class FreeRing:
    """Free page ids are `ids[(start + i) % num_pages]`, `i < count`: empty and full differ."""

    ids: Array  # int32 [num_pages]
    start: Array  # int32 []
    count: Array  # int32 []

    @staticmethod
    def full(num_pages: int) -> "FreeRing":
        """A ring in which every page is free."""
        return FreeRing(jnp.arange(num_pages, dtype=jnp.int32), jnp.int32(0), jnp.int32(num_pages))


def allocate(ring: FreeRing, wanted: Array, most: int) -> tuple[Array, FreeRing]:
    """Take `wanted [N]` pages for each claimant; the caller has made sure that their sum is free.

    Returns ids `[N, most]` int32, `num_pages` where a claimant has fewer, and the ring.
    """
    num_pages = ring.ids.shape[0]
    offset = jnp.cumsum(wanted) - wanted
    nth = jnp.arange(most)
    ids = ring.ids[(ring.start + offset[:, None] + nth) % num_pages]
    taken = wanted.sum()
    ring = FreeRing(ring.ids, (ring.start + taken) % num_pages, ring.count - taken)
    return jnp.where(nth < wanted[:, None], ids, num_pages), ring


def release(ring: FreeRing, ids: Array, valid: Array) -> FreeRing:
    """Return pages `ids` where `valid` (any equal shapes): prefix sums give each its own place."""
    num_pages = ring.ids.shape[0]
    valid, ids = valid.ravel(), ids.ravel()
    rank = jnp.cumsum(valid) - 1
    target = jnp.where(valid, (ring.start + ring.count + rank) % num_pages, num_pages)
    return FreeRing(ring.ids.at[target].set(ids, mode="drop"), ring.start, ring.count + valid.sum())


def grow(
    ring: FreeRing, page_table: Array, tier: int, pages: Array, new_pages: Array, most: int
) -> tuple[FreeRing, Array]:
    """Extend the tier of each head from `pages [B]` to `new_pages [B]` pages, at most `most` more.
    `page_table [B, max_pages]`.
    """
    ids, ring = allocate(ring, jnp.maximum(new_pages - pages, 0), most)
    new = jnp.arange(most) < (new_pages - pages)[:, None]
    return ring, _set_columns(page_table, tier, pages, ids, new)


def shrink(
    ring: FreeRing, page_table: Array, tier: int, pages: Array, new_pages: Array, most: int
) -> tuple[FreeRing, Array]:
    """Cut each head's tier from `pages [B]` to `new_pages [B]`, at most `most` fewer; free them."""
    freed = jnp.arange(most) < (pages - new_pages)[:, None]
    ids = tier_page_ids(page_table, tier, new_pages, most)
    ring = release(ring, ids, freed)
    empty = jnp.full_like(ids, ring.ids.shape[0])
    return ring, _set_columns(page_table, tier, new_pages, empty, freed)


def _set_columns(page_table: Array, tier: int, first: Array, ids: Array, valid: Array) -> Array:
    """Write `ids [B, n]` as pages `first [B], first + 1, ...` of a tier where `valid [B, n]`."""
    heads, max_pages = page_table.shape
    column = page_column(tier, first[:, None] + jnp.arange(ids.shape[1]), max_pages)
    column = jnp.where(valid, column, max_pages)
    return page_table.at[jnp.arange(heads)[:, None], column].set(ids, mode="drop")
