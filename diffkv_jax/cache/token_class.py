"""Which class the token at each position is of: 0 any, 1 always stays, from 2 on those that `Keep`
asks for (`Keep.token_classes`).
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import LayerView

PROTECTED_CLASS = 1


def note_classes(cache: KVCache, tokens: Array, positions: Array) -> KVCache:
    """The cache that knows the classes of `tokens` int32 [R, T] at `positions` int32 [R, T], -1
    where there is none.
    """
    if not cache.policy.classifies:
        return cache
    found = jnp.zeros(tokens.shape, cache.state.classes.dtype)
    for number, ids in reversed([*enumerate(cache.policy.token_classes, PROTECTED_CLASS)]):
        found = jnp.where(jnp.isin(tokens, jnp.asarray(ids, jnp.int32)), number, found)
    at = jnp.where(positions >= 0, positions, cache.spec.max_len)
    rows = jnp.arange(tokens.shape[0])[:, None]
    classes = cache.state.classes.at[rows, at].set(
        found.astype(cache.state.classes.dtype), mode="drop"
    )
    return dataclasses.replace(cache, state=cache.state._replace(classes=classes))


def classes_at(cache: KVCache, view: LayerView, position: Array) -> Array:
    """Class of the tokens of each head at `position` int32 [B, n]; sinks always stay."""
    found = jnp.zeros(position.shape, jnp.uint8)
    if cache.policy.classifies:
        known = view.per_head(cache.state.classes)
        found = jnp.take_along_axis(known, jnp.clip(position, 0, cache.spec.max_len - 1), axis=1)
    return jnp.where(position < cache.policy.protect.sinks, jnp.uint8(PROTECTED_CLASS), found)


def protected_tokens(cache: KVCache, view: LayerView, position: Array) -> Array | None:
    """Which tokens of each head at `position` int32 [B, n] always stay, bool; None: the policy
    protects none, or its keep rule sees to them (`Keep.protects`).
    """
    protect = cache.policy.protect
    if cache.policy.keep.protects or not (protect.sinks or protect.token_ids):
        return None
    return classes_at(cache, view, position) == PROTECTED_CLASS
