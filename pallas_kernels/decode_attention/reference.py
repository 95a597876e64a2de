"""Decode attention of one query token a request over the stored tiers and the recent window."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..pages import PageLayout, Pages
from .stream import (
    Partial,
    add_significance,
    chunk_logits,
    chunk_mix,
    group_score,
    num_chunks,
    over_chunks,
    read_chunk,
    soft_cap,
)


class Heads(NamedTuple):
    """What the `B` = requests x KV heads of one layer hold besides the pool.

    The windows are those of all layers: slicing one off would be a copy.
    """

    page_table: Array  # int32 [B, max_pages]
    tier_len: Array  # int32 [B, tiers]
    recent_k: Array  # [L, B, window + flush, d]
    recent_v: Array  # [L, B, window + flush, d], no channels where keys serve as values
    recent_len: Array  # int32 [B]
    layer: Array  # int32 [] which layer of recent_k and recent_v
    # float16 or bfloat16 [L, KV heads, ...] learned for K and V of each tier
    tables: tuple[tuple[Array | None, Array | None], ...] = ()

    def recent(self) -> tuple[Array, Array, Array]:
        """Recent K and V float32 `[B, window + flush, d]`, dead slots zeroed, and the live mask."""
        windows = (self.recent_k, self.recent_v)
        k, v = (lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in windows)
        live = jnp.arange(k.shape[1]) < self.recent_len[:, None]
        k, v = (jnp.where(live[..., None], x, 0).astype(jnp.float32) for x in (k, v))
        return k, v, live


class Sliding(NamedTuple):
    """A sliding window: a query sees only the keys at positions above `position - size`."""

    size: int
    position: Array  # int32 [B] of the query


def decode_attention(
    q: Array,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    *,
    max_len: int,
    sm_scale: float,
    logits_soft_cap: float | None = None,
    sliding: Sliding | None = None,
) -> tuple[Array, Array, Array]:
    """`decode_attention` of api.py in plain jax.numpy."""
    q = q.astype(jnp.float32)
    recent_k, recent_v, live = heads.recent()
    recent_logits = soft_cap(jnp.einsum("bgd,btd->bgt", q, recent_k) * sm_scale, logits_soft_cap)
    seen = live & _recent_seen(heads, sliding)
    recent_logits = jnp.where(seen[:, None], recent_logits, -jnp.inf)
    values = layout.formats[0].values(recent_k, recent_v)
    partial = Partial.empty(q.shape[:2], values.shape[2])
    partial = partial.add(recent_logits, lambda p: jnp.einsum("bgt,btd->bgd", p, values))
    logits = []
    for tier in range(layout.tiers):
        partial, tier_logits = _attend_tier(
            q, partial, pages, layout, tier, heads, max_len, sm_scale, logits_soft_cap, sliding
        )
        logits.append(tier_logits)
    output, lse = partial.normalised()
    if not layout.scored:
        return output, pages.significance, jnp.zeros(recent_logits.shape[::2], jnp.float32)
    significance = pages.significance
    for tier in range(layout.tiers):
        significance = _score_tier(significance, logits[tier], lse, pages, layout, tier, heads)
    return output, significance, group_score(recent_logits, lse[..., None], layout)


def _recent_seen(heads: Heads, sliding: Sliding | None) -> Array:
    """Which recent slots `[B, window + flush]` a sliding window lets the query see; the query's own
    token is the last live one.
    """
    slots = jnp.arange(heads.recent_k.shape[2])
    if sliding is None:
        return jnp.ones((1, slots.shape[0]), bool)
    return heads.recent_len[:, None] - 1 - slots < sliding.size


def _attend_tier(
    q, partial, pages, layout, tier, heads, max_len, sm_scale, cap, sliding
) -> tuple[Partial, Array]:
    """Take a tier into `partial`; the logits of its chunks `[chunks, B, G, chunk tokens]` are kept
    for the significance when scored.
    """
    chunk = read_chunk(pages, layout, tier, heads.page_table, heads.tier_len, jnp.int32(0))
    chunks = num_chunks(layout, tier, max_len) if layout.scored else 0
    kept = jnp.zeros((chunks, *q.shape[:2], chunk.valid.shape[1]), jnp.float32)

    def body(i, state):
        partial, kept = state
        chunk = read_chunk(pages, layout, tier, heads.page_table, heads.tier_len, i)
        logits = chunk_logits(q, chunk, layout, tier, sm_scale, cap)
        if sliding is not None:
            seen = chunk.position > (sliding.position - sliding.size)[:, None]
            logits = jnp.where(seen[:, None], logits, -jnp.inf)
        if layout.scored:
            kept = lax.dynamic_update_index_in_dim(kept, logits, i, 0)
        return partial.add(logits, lambda p: chunk_mix(p, chunk, layout, tier)), kept

    return over_chunks(layout, tier, heads.tier_len, body, (partial, kept))


def _score_tier(significance, logits, lse, pages, layout, tier, heads) -> Array:
    def body(i, significance):
        chunk = read_chunk(pages, layout, tier, heads.page_table, heads.tier_len, i)
        scores = group_score(logits[i], lse[..., None], layout)
        return add_significance(significance, chunk, layout, tier, scores)

    return over_chunks(layout, tier, heads.tier_len, body, significance)
