"""FastGen (arXiv:2310.01801): each head keeps the cheapest union of token classes that holds enough
of its attention.

The tokens that go get negative scores, and the threshold is 0: events and kernels know nothing of
classes.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import per_head, put_layer, stored_layer, take_layer
from diffkv_jax.pallas_kernels.pages import read_token_data, write_token_array
from diffkv_jax.policy.keep import reached_by
from diffkv_jax.policy.protect import PUNCTUATION, SPECIAL, classes_at

HEAD_POLICIES = (
    "special",
    "special, punctuation",
    "special, punctuation, frequent",
    "special, punctuation, frequent, local",
    "full",
)
FULL = len(HEAD_POLICIES) - 1


def choose_and_mark(
    cache: KVCache,
    layer: Array,
    scores: Array,
    position: Array,
    valid: Array,
    leaving: Array,
    length: Array,
) -> tuple[KVCache, Array]:
    """Pick the policy of each head of a layer after a prompt chunk of `length` int32 [R] tokens and
    mark what it does not keep.

    `scores`, `position`, `valid`, `leaving` `[B, n]` describe the tokens outside the pool. Returns
    the cache, its choices and the stored tokens' scores changed, and `scores` likewise.
    """
    return _mark(cache, layer, scores, position, valid, leaving, cache.seq_len + length, length > 0)


def mark_all(cache: KVCache, count: Array) -> KVCache:
    """Mark what the heads' policies do not keep when the oldest `count` int32 [R] recent tokens of
    each request leave the window.
    """
    slot = jnp.arange(cache.spec.window + cache.spec.flush)
    first, recent, going = (
        per_head(cache, x)[:, None]
        for x in (cache.seq_len - cache.recent_len, cache.recent_len, count)
    )

    def mark(layer: Array, cache: KVCache) -> KVCache:
        scores = take_layer(cache.recent_significance, layer)
        cache, scores = _mark(
            cache, layer, scores, first + slot, slot < recent, slot < going, cache.seq_len, None
        )
        return dataclasses.replace(
            cache, recent_significance=put_layer(cache.recent_significance, layer, scores)
        )

    return lax.fori_loop(0, len(cache.spec.paged_layers), mark, cache)


def unmark(cache: KVCache) -> KVCache:
    """The cache after an event: tokens of requests that found no page were marked and are still
    there.
    """
    pages = dataclasses.replace(cache.pages, significance=jnp.abs(cache.pages.significance))
    return dataclasses.replace(
        cache, pages=pages, recent_significance=jnp.abs(cache.recent_significance)
    )


def _mark(
    cache: KVCache,
    layer: Array,
    scores: Array,
    position: Array,
    valid: Array,
    leaving: Array,
    seq_len: Array,
    chooses: Array | None,
) -> tuple[KVCache, Array]:
    """`chooses` bool [R]: whose heads pick a policy now; None: all keep what they have."""
    spec, held = cache.spec, stored_layer(cache, layer)
    stored, stored_position, live = read_token_data(
        held.pages, spec.layout, held.page_table, held.tier_len, 0, spec.max_len
    )
    every = jnp.where(
        jnp.concatenate([live, valid], axis=1), jnp.concatenate([stored, scores], axis=1), -jnp.inf
    )
    at = jnp.concatenate([stored_position.astype(jnp.int32), position], axis=1)
    level = _levels(cache, every, at, per_head(cache, seq_len))
    choice = take_layer(cache.choice, layer)
    if chooses is not None:
        picked = _cheapest(level, jnp.maximum(every, 0), take_layer(cache.limits, layer)[:, 0])
        choice = jnp.where(per_head(cache, chooses), picked, choice)
    gone = (
        (level > choice[:, None])
        & jnp.concatenate([live, leaving], axis=1)
        & leaving.any(axis=1)[:, None]
    )
    marked = jnp.where(gone, -jnp.maximum(every, jnp.finfo(jnp.float32).tiny), every)
    stored, scores = (
        jnp.where(live, marked[:, : live.shape[1]], stored),
        jnp.where(valid, marked[:, live.shape[1] :], scores),
    )
    significance = write_token_array(
        cache.pages.significance, spec.layout, held.page_table, 0, held.tier_len[:, 0], stored
    )
    pages = dataclasses.replace(cache.pages, significance=significance)
    return dataclasses.replace(
        cache, pages=pages, choice=put_layer(cache.choice, layer, choice)
    ), scores


def _levels(cache: KVCache, scores: Array, position: Array, seq_len: Array) -> Array:
    """int32 [B, n]: the cheapest of `HEAD_POLICIES` that keeps each token. `scores` are -inf where
    there is none; `seq_len` [B].
    """
    selection, classes = cache.spec.selection, classes_at(cache, position)
    frequent, local = (
        jnp.floor(share * seq_len + 1e-3).astype(jnp.int32)
        for share in (selection.frequent, selection.local)
    )
    often = scores >= reached_by(scores, scores > -jnp.inf, frequent)[:, None]
    level = jnp.where(often, 2, jnp.where(position >= (seq_len - local)[:, None], 3, FULL))
    return jnp.where(classes == SPECIAL, 0, jnp.where(classes == PUNCTUATION, 1, level))


def _cheapest(level: Array, scores: Array, share: Array) -> Array:
    """int32 [B]: the first policy whose tokens have got `share [B]` of all attention that was seen,
    `scores [B, n]`; else all of them.
    """
    kept = jnp.stack([jnp.where(level <= policy, scores, 0).sum(axis=1) for policy in range(FULL)])
    return (kept < share * scores.sum(axis=1)).sum(axis=0, dtype=jnp.int32)
