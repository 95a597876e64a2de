"""A request's compressed pages out of the pool into host memory, and back bit for bit."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.pallas_kernels.apply_event import FreeRing, allocate
from diffkv_jax.pallas_kernels.pages import Pages
from diffkv_jax.serving.rows import Pool, Rows

PAGES = 256  # moved by one call


class Parked(NamedTuple):
    """What one request is, on the host."""

    rows: Rows  # NumPy; page ids of the pool that it was in
    held: np.ndarray  # int64 [n] where in the flat page table its pages stand
    pages: tuple[Pages, ...]  # NumPy, PAGES each

    @property
    def num_pages(self) -> int:
        """Pages that it takes when it comes back."""
        return len(self.held)


def parked(pool: Pool, row: Rows) -> Parked:
    """A copy of the single row and its pages, which stay where they are."""
    num_pages = pool.pages.num_pages
    rows = jax.device_get(row)
    table = np.zeros(0, np.int32) if rows.page_table is None else rows.page_table.ravel()
    held = np.flatnonzero(table != num_pages)
    ids = _parts(table[held], num_pages)
    return Parked(rows, held, tuple(jax.device_get(fetched(pool.pages, part)) for part in ids))


def unparked(pool: Pool, found: Parked) -> tuple[Pool, Rows]:
    """The pool, donated, with the pages of a parked request in as many free ones, and its row.

    The caller has made sure that so many are free.
    """
    rows, num_pages = found.rows, pool.pages.num_pages
    if found.num_pages:
        assert rows.page_table is not None
        ids, ring = taken(pool.ring, jnp.int32(found.num_pages), rows.page_table.size)
        pool = Pool(pool.pages, ring)
        ids = np.asarray(ids)[: found.num_pages]
        table = rows.page_table.copy()
        table.reshape(-1)[found.held] = ids
        rows = rows._replace(page_table=table)
        for part, pages in zip(_parts(ids, num_pages), found.pages, strict=True):
            pool = pool._replace(pages=returned(pool.pages, part, pages))
    return pool, jax.tree.map(jnp.asarray, rows)


def _parts(ids: np.ndarray, none: int) -> list[np.ndarray]:
    """Of PAGES each, filled up with `none`."""
    filled = np.full(-(-len(ids) // PAGES) * PAGES, none, np.int32)
    filled[: len(ids)] = ids
    return list(filled.reshape(-1, PAGES))


@jax.jit
def fetched(pages: Pages, ids: Array) -> Pages:
    """The pages `ids` int32 [PAGES]."""
    return jax.tree.map(lambda x: x.at[ids].get(mode="clip"), pages)


@partial(jax.jit, donate_argnames="pages")
def returned(pages: Pages, ids: Array, values: Pages) -> Pages:
    """`pages`, donated, with `values` at `ids` int32 [PAGES]; none where there is no such page."""
    return jax.tree.map(lambda x, new: x.at[ids].set(new, mode="drop"), pages, values)


@partial(jax.jit, donate_argnames="ring", static_argnames="most")
def taken(ring: FreeRing, count: Array, most: int) -> tuple[Array, FreeRing]:
    """`count` free ids (int32 [most], none behind them), and the ring without them."""
    ids, ring = allocate(ring, count[None], most)
    return ids[0], ring
