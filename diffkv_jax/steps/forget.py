"""Scores that forget (`Score.horizon`, docs/design.md 1): a token's score is a sum of weighted
probabilities, which is scaled down before new queries come in. Spans of queries are cut likewise
(`Counters.query_spans`), so that they count what the weights of a token's score add up to, and
kernels divide by it as by a number of queries.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache, with_counters, with_significance
from diffkv_jax.cache.layer import LayerView
from diffkv_jax.cache.query_counts import last_queries
from diffkv_jax.pallas_kernels.pages import Pages, page_column
from diffkv_jax.pallas_kernels.plan_event import scored_by
from diffkv_jax.policy.score import is_protected

PAGES_AT_ONCE = 1024
MANY = 2**30  # queries


def forget(cache: KVCache, requests: Array, coming: Array | int) -> KVCache:
    """The cache ready for the next `coming` int32 [R] queries of `requests` (bool [R]): the weights
    of earlier ones add up to `most_weight` or less. Other requests keep their bits. All layers at
    once.
    """
    score = cache.policy.score
    if score is None or score.horizon is None or not cache.spec.paged_layers:
        return cache
    before = cache.counters.query_spans
    most = most_weight(score.horizon, jnp.asarray(coming))
    after = last_queries(before, jnp.where(requests, most, before[..., 1].sum(axis=1)))
    spans, weight = jnp.moveaxis(before, 0, -1), after[..., 1].sum(axis=1)

    def faded(scores: Array, position: Array, request: Array) -> Array:
        """`scores` [n, ...] of tokens of the `request` int32 [n], each n of one request."""
        known, request = request >= 0, jnp.maximum(request, 0)
        queries = scored_by(position, spans[..., request])
        most = jnp.where(known, weight[request], MANY).reshape(-1, *(1,) * (scores.ndim - 1))
        new = scores * (most.astype(jnp.float32) / jnp.maximum(queries, 1).astype(jnp.float32))
        return jnp.where((queries > most) & ~is_protected(scores), new, scores)

    changes, view = (after != before).any(), LayerView(cache.spec, None)
    position, request = _recent_positions(cache, view)
    recent = faded(view.take(cache.recent.significance), position, request)
    stored = _in_parts(faded, changes, cache.stored.pages, owners(cache))
    cache = with_significance(cache, stored, view.put(cache.recent.significance, recent))
    return with_counters(cache, query_spans=after)


def most_weight(horizon: int, coming: Array) -> Array:
    """What the weights of all earlier queries may add up to before `coming` ones, int32.

    In decode, with `coming` queries between all events, the queries are then as old on average as
    the last `horizon` are: `coming / 2 + most_weight = horizon / 2`.
    """
    return jnp.maximum(horizon - coming, 0) // 2


def _in_parts(change: Callable, changes: Array, pages: Pages, owner: Array) -> Array:
    """The pool's scores after `change(scores, position, owner)`, some pages at a time: XLA moves
    what does not depend on the scores out of a condition, and would keep it for the whole pool.
    """
    num_pages = pages.num_pages
    size = min(PAGES_AT_ONCE, num_pages)
    if not num_pages:
        return pages.significance

    def of_part(i: Array, scores: Array) -> Array:
        first = jnp.minimum(i * size, num_pages - size)
        of = scores, pages.position, owner
        part, position, request = (lax.dynamic_slice_in_dim(x, first, size) for x in of)
        fresh = (first + jnp.arange(size) >= i * size)[:, None, None]  # not of the part before
        new = jnp.where(fresh, change(part, position, request), part)
        return lax.dynamic_update_slice_in_dim(scores, new, first, 0)

    parts = jnp.where(changes, -(-num_pages // size), 0)
    return lax.fori_loop(0, parts, of_part, pages.significance)


def owners(cache: KVCache) -> Array:
    """Request of each page, int32 [num_pages]; -1: it is free, or another cache's on the same pool
    (`diffkv_jax.serving`).
    """
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
    return jnp.full(num_pages, -1, jnp.int32).at[ids.ravel()].set(request.ravel(), mode="drop")


def _recent_positions(cache: KVCache, view: LayerView) -> tuple[Array, Array]:
    """Position int32 [L x R x K, N] of each slot of the windows, and request [L x R x K]."""
    now = cache.counters
    first, request = map(view.per_head, (now.seq_len - now.recent_len, jnp.arange(len(now.steps))))
    return first[:, None] + jnp.arange(cache.recent.significance.shape[-1]), request
