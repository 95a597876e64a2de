"""The rows of requests apart from the pool they share: a `KVCache` is taken apart and put together,
so that some requests can be read while others decode, without a copy of the pool.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import (
    Counters,
    KVCache,
    MethodState,
    Recent,
    Sliding,
    complete,
    empty_cache,
    without_empty,
)
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.pallas_kernels.apply_event import FreeRing, Stored
from diffkv_jax.pallas_kernels.pages import Pages
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.stage import with_leaves


class Pool(NamedTuple):
    """What all requests share and every program changes."""

    pages: Pages
    ring: FreeRing


class Rows(NamedTuple):
    """What R requests have of their own; its arrays are those of a `KVCache`."""

    keep: Any  # thresholds or budgets [L, R, K]
    page_table: Array | None
    tier_len: Array | None
    recent: Recent
    sliding: Sliding
    counters: Counters
    state: MethodState


# the axis of requests
_AXES = Rows(1, 1, 1, 1, 1, 0, MethodState(1, 1, 0))  # pyright: ignore[reportArgumentType]


def apart(cache: KVCache) -> tuple[KVCache, Pool, Rows]:
    """What never changes (arrays of rows and pool are None there), the pool, and the rows."""
    pages, ring, page_table, tier_len = cache.stored
    rows = Rows(
        cache.policy.keep,
        page_table,
        tier_len,
        cache.recent,
        cache.sliding,
        cache.counters,
        cache.state,
    )
    nothing = jax.tree.map(lambda _: None, rows)
    of = cache.spec.num_requests
    fixed = together(cache, Pool(None, None), nothing, of=of)  # pyright: ignore[reportArgumentType]
    return fixed, Pool(pages, ring), rows


def together(fixed: KVCache, pool: Pool, rows: Rows, *, of: int | None = None) -> KVCache:
    """Inverse of `apart`: the cache of these rows, of which there are `of`, counted when None."""
    count = rows.counters.seq_len.shape[0] if of is None else of
    return replace(
        fixed,
        spec=replace(fixed.spec, num_requests=count),
        policy=with_leaves(fixed.policy, keep=rows.keep),
        stored=Stored(*pool, rows.page_table, rows.tier_len),  # pyright: ignore[reportArgumentType]
        recent=rows.recent,
        sliding=rows.sliding,
        counters=rows.counters,
        state=rows.state,
    )


def _by_axis(change: Any, *of: Rows) -> Rows:
    """`change(axis, *arrays)` of each array of rows."""
    axes = jax.tree.map(lambda axis, part: jax.tree.map(lambda _: axis, part), _AXES, of[0])
    return jax.tree.map(change, axes, *of)


def joined(parts: tuple[Rows, ...]) -> Rows:
    """All rows of `parts`, in order."""
    return _by_axis(lambda axis, *x: jnp.concatenate(x, axis=axis), *parts)


def one_by_one(rows: Rows) -> tuple[Rows, ...]:
    """Each row by itself."""
    return tuple(_picked(rows, jnp.array([i])) for i in range(rows.counters.seq_len.shape[0]))


def _picked(rows: Rows, index: Array) -> Rows:
    return _by_axis(lambda axis, x: jnp.take(x, index, axis=axis), rows)


@partial(jax.jit, static_argnames="spec")
def blank(spec: CacheSpec, policy: CompressionPolicy) -> Rows:
    """A row without tokens for a policy bound to one request; the pool of `spec` is not made."""
    return apart(empty_cache(spec, policy))[2]


@jax.jit
def picked(rows: Rows, index: Array) -> Rows:
    """The rows `index` int32 [n]."""
    return _picked(rows, index)


@partial(jax.jit, donate_argnames="rows")
def placed(rows: Rows, one: Rows, index: Array) -> Rows:
    """`rows`, donated, with the single row `one` at `index` int32 []."""
    at = jax.lax.dynamic_update_slice_in_dim
    return _by_axis(lambda axis, x, new: at(x, new, index, axis), rows, one)


@jax.jit
def several(parts: tuple[Rows, ...]) -> Rows:
    """All rows of `parts`, in order."""
    return joined(parts)


def completed(fixed: KVCache, pool: Pool, rows: Rows) -> KVCache:
    """The cache of these rows as steps take it (`cache.complete`)."""
    return complete(together(fixed, pool, rows))


def taken_apart(cache: KVCache) -> tuple[Pool, Rows]:
    """Pool and rows of a cache that a step has returned."""
    _, pool, rows = apart(without_empty(cache))
    return pool, rows
