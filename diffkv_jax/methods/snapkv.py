"""Scores of attention that concern the last queries only: earlier ones forgotten, averaged over
neighbouring positions, over heads.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import CacheSpec, KVCache
from diffkv_jax.pallas_kernels.apply_event import Stored
from diffkv_jax.pallas_kernels.branch import when
from diffkv_jax.pallas_kernels.pages import read_token_data, write_token_array
from diffkv_jax.policy.selection import is_protected


def forget(cache: KVCache, decides: Array) -> KVCache:
    """The cache without what earlier queries gave (protected tokens stay so), where the policy is
    about to decide: `decides` bool [].
    """
    if not cache.spec.selection.starts_anew:
        return cache

    def anew(scores: tuple[Array, Array]) -> tuple[Array, Array]:
        stored, recent = (jnp.where(is_protected(x), x, 0.0) for x in scores)
        return stored, recent

    stored, recent = when(decides, anew, (cache.pages.significance, cache.recent_significance))
    return dataclasses.replace(
        cache,
        pages=dataclasses.replace(cache.pages, significance=stored),
        recent_significance=recent,
    )


def smooth(
    spec: CacheSpec,
    stored: Stored,
    significance: Array,
    entering: Array,
    position: Array,
    counted: Array,
) -> tuple[Array, Array]:
    """The scores of stored tokens and of those `counted` (bool [B, n]: leaving, not protected)
    averaged over `pooling` neighbours.

    SnapKV's pooling (arXiv:2404.14469): tokens in the recent window, protected and dropped ones
    count as 0, as does what lies beyond the ends. `significance` is the pool's, `entering` float32
    and `position` int32 [B, n] are those of the tokens outside of it.
    """
    layout, rows = spec.layout, jnp.arange(counted.shape[0])[:, None]
    pages = dataclasses.replace(stored.pages, significance=significance)
    by_position = jnp.zeros((counted.shape[0], spec.max_len), jnp.float32)
    by_position = by_position.at[rows, jnp.where(counted, position, spec.max_len)].set(
        entering, mode="drop"
    )
    places = []
    for tier in range(layout.tiers):
        scores, stored_position, live = read_token_data(
            pages, layout, stored.page_table, stored.tier_len, tier, spec.max_len
        )
        places.append((scores, jnp.where(live, stored_position.astype(jnp.int32), spec.max_len)))
        by_position = by_position.at[rows, places[-1][1]].set(
            jnp.where(is_protected(scores), 0.0, scores), mode="drop"
        )
    averaged = moving_average(by_position, spec.selection.pooling)
    for tier, (scores, stored_position) in enumerate(places):
        new = jnp.take_along_axis(averaged, jnp.minimum(stored_position, spec.max_len - 1), axis=1)
        values = jnp.where(is_protected(scores), scores, new)
        significance = write_token_array(
            significance, layout, stored.page_table, tier, stored.tier_len[:, tier], values
        )
    return significance, jnp.take_along_axis(
        averaged, jnp.clip(position, 0, spec.max_len - 1), axis=1
    )


def average_heads(
    spec: CacheSpec, stored: Stored, significance: Array, entering: Array
) -> tuple[Array, Array]:
    """The scores of stored and of entering tokens `[B, n]` averaged over the KV heads of a layer:
    all hold the same ones.
    """
    layout, kv_heads = spec.layout, spec.attention.num_kv_heads

    def mean(scores: Array) -> Array:
        return jnp.repeat(
            scores.reshape(-1, kv_heads, scores.shape[1]).mean(axis=1), kv_heads, axis=0
        )

    for tier in range(layout.tiers):
        pages = dataclasses.replace(stored.pages, significance=significance)
        scores, _, _ = read_token_data(
            pages, layout, stored.page_table, stored.tier_len, tier, spec.max_len
        )
        significance = write_token_array(
            significance, layout, stored.page_table, tier, stored.tier_len[:, tier], mean(scores)
        )
    return significance, mean(entering)


def moving_average(x: Array, width: int) -> Array:
    """Mean over `width` neighbours of the last axis `[B, n]`, zeros beyond its ends."""
    before = (width - 1) // 2
    return (
        lax.reduce_window(
            x, 0.0, lax.add, (1, width), (1, 1), ((0, 0), (before, width - 1 - before))
        )
        / width
    )
