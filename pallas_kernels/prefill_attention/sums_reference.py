"""Significance from a prompt: probability mass of each key (DiffKV, arXiv 2412.03131 sec. 4)."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..decode_attention.reference import Heads
from ..decode_attention.stream import add_significance, chunk_logits, over_chunks, read_chunk
from ..pages import PageLayout, Pages
from .reference import Chunk, Scale, exact_logits, own_logits, recent_keys

BLOCK_ROWS = 64  # observing rows that one step holds


class ColumnSums(NamedTuple):
    """Sum over the observing rows, then maximum or mean over the query heads of the group."""

    pages: Array  # the pool's significance [num_pages, blocks, T] with the sums added
    recent: Array  # float32 [B, window + flush]
    chunk: Array  # float32 [B, C]


def column_sums(
    chunk: Chunk,
    lse: Array,
    observe: int,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    scale: Scale,
) -> ColumnSums:
    """`column_sums` of api.py in plain jax.numpy."""
    chunk = chunk.float32()
    b, g, c, d = chunk.q.shape
    rows = min(BLOCK_ROWS, observe)
    blocks = -(-observe // rows)
    recent = recent_keys(heads)

    def summed(keys: int, logits_of: Callable) -> Array:
        """`sum_rows exp(logit - lse)`, then maximum or mean over the group: `[B, keys]`."""

        def body(i, total):
            # blocks from the end; the first may overlap the second: masked
            first = jnp.maximum(c - (i + 1) * rows, 0)
            q = lax.dynamic_slice_in_dim(chunk.q, first, rows, axis=2).reshape(b, g * rows, d)
            row = first + jnp.arange(rows)
            counted = (
                (row >= c - observe) & (row < c - i * rows) & (row >= c - chunk.length[:, None])
            )
            p = jnp.exp(
                logits_of(q, first).reshape(b, g, rows, keys)
                - lax.dynamic_slice_in_dim(lse, first, rows, axis=2)[..., None]
            )
            return total + jnp.where(counted[:, None, :, None], p, 0).sum(axis=2)

        sums = lax.fori_loop(0, blocks, body, jnp.zeros((b, g, keys), jnp.float32))
        return sums.max(axis=1) if layout.group == "max" else sums.mean(axis=1)

    significance = pages.significance
    for tier in range(layout.tiers):

        def add_chunk(i, significance, tier=tier):
            part = read_chunk(pages, layout, tier, heads.page_table, heads.tier_len, i)
            sums = summed(
                part.valid.shape[1],
                lambda q, first: chunk_logits(
                    q, part, layout, tier, scale.sm_scale, scale.soft_cap
                ),
            )
            return add_significance(significance, part, layout, tier, sums)

        significance = over_chunks(layout, tier, heads.tier_len, add_chunk, significance)
    return ColumnSums(
        significance,
        summed(recent.k.shape[1], lambda q, first: exact_logits(q, recent, scale)),
        summed(c, lambda q, first: own_logits(q, chunk.k, 0, first, rows, chunk, scale)),
    )
