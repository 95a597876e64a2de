"""Scores that forget (`Score.horizon`, docs/design.md 1): a token's score is a sum of weighted
probabilities. Before so many new queries come in that their number would pass the horizon, what is
there is scaled down. Spans of queries are cut likewise (`Counters.query_spans`), so that they count
what the weights of a token's score add up to, and kernels divide by it as by a number of queries.
"""

import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import KVCache, with_counters, with_significance
from diffkv_jax.cache.query_counts import last_queries
from diffkv_jax.pallas_kernels.branch import when
from diffkv_jax.pallas_kernels.pages import page_column
from diffkv_jax.pallas_kernels.plan_event import scored_by
from diffkv_jax.policy.score import is_protected


def forget(cache: KVCache, requests: Array, coming: Array | int) -> KVCache:
    """The cache ready for the next `coming` int32 [R] queries of `requests` (bool [R]), between two
    layers' loops: weights of earlier ones add up to no more than the horizon without them, to
    nothing where they fill it. The others keep their bits.
    """
    score = cache.policy.score
    if score is None or score.horizon is None or not cache.spec.paged_layers:
        return cache
    before = cache.counters.query_spans
    most = jnp.maximum(score.horizon - jnp.asarray(coming), 0)
    after = last_queries(before, jnp.where(requests, most, before[..., 1].sum(axis=1)))
    spans, weight = jnp.moveaxis(before, 0, -1), after[..., 1].sum(axis=1)

    def faded(scores: Array, position: Array, request: Array) -> Array:
        """`scores` [n, ...] of tokens of the `request` int32 [n], each n of one request."""
        queries = scored_by(position, spans[..., request])
        most = weight[request].reshape(-1, *(1,) * (scores.ndim - 1))
        new = scores * (most.astype(jnp.float32) / jnp.maximum(queries, 1).astype(jnp.float32))
        return jnp.where((queries > most) & ~is_protected(scores), new, scores)

    def fade(scores: tuple[Array, Array]) -> tuple[Array, Array]:
        stored, recent = scores
        stored = faded(stored, cache.stored.pages.position, _owners(cache))
        position, request = _recent_positions(cache)
        flat = faded(recent.reshape(len(request), -1), position, request)
        return stored, flat.reshape(recent.shape)

    scores = cache.stored.pages.significance, cache.recent.significance
    stored, recent = when((after != before).any(), fade, scores)
    return with_counters(with_significance(cache, stored, recent), query_spans=after)


def _owners(cache: KVCache) -> Array:
    """Request of each page, int32 [num_pages]; 0 of free ones."""
    _, _, page_table, tier_len = cache.stored
    width, layout = page_table.shape[-1], cache.spec.layout
    column = jnp.arange(width)
    held = jnp.zeros(page_table.shape, bool)
    for tier in range(layout.tiers):
        index = page_column(tier, column, width)  # its own inverse
        held |= index < layout.pages_for(tier, tier_len[..., tier, None])
    request = jnp.broadcast_to(jnp.arange(cache.spec.num_requests)[:, None, None], page_table.shape)
    num_pages = cache.stored.pages.num_pages
    ids = jnp.where(held, page_table, num_pages)
    return jnp.zeros(num_pages, jnp.int32).at[ids.ravel()].set(request.ravel(), mode="drop")


def _recent_positions(cache: KVCache) -> tuple[Array, Array]:
    """Position int32 [L x R x K, N] of each slot of the windows, and request [L x R x K]."""
    layers, requests, kv_heads, slots = cache.recent.significance.shape
    now = cache.counters
    request = jnp.tile(jnp.repeat(jnp.arange(requests), kv_heads), layers)
    return (now.seq_len - now.recent_len)[request][:, None] + jnp.arange(slots), request
