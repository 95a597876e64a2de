"""The recent window: new tokens in, the oldest out."""

import jax.numpy as jnp
from jax import Array, lax


def append_recent(
    recent_k: Array, recent_v: Array, layer: Array, k: Array, v: Array, slot: Array
) -> tuple[Array, Array]:
    """`append_recent` of api.py in plain jax.numpy."""
    slots = recent_k.shape[2]
    at = layer, jnp.arange(recent_k.shape[1]), jnp.where(slot >= 0, slot, slots)
    return recent_k.at[at].set(k.astype(recent_k.dtype), mode="drop"), recent_v.at[at].set(
        v.astype(recent_v.dtype), mode="drop"
    )


def shift_recent(
    recent_k: Array, recent_v: Array, significance: Array, layer: Array, shift: Array
) -> tuple[Array, Array, Array]:
    """`shift_recent` of api.py in plain jax.numpy."""
    scored = significance.shape[2] > 0
    return (
        _shift(recent_k, layer, shift),
        _shift(recent_v, layer, shift),
        _shift(significance, layer, shift) if scored else significance,
    )


def _shift(recent: Array, layer: Array, shift: Array) -> Array:
    """Remove the first `shift [B]` slots of a layer of `recent [L, B, N, ...]`; zeros follow."""
    one = lax.dynamic_index_in_dim(recent, layer, keepdims=False)
    slot = jnp.arange(one.shape[1]) + shift[:, None]
    shape = (*slot.shape, *(1,) * (one.ndim - 2))
    moved = jnp.take_along_axis(one, jnp.minimum(slot, one.shape[1] - 1).reshape(shape), axis=1)
    shifted = jnp.where((slot < one.shape[1]).reshape(shape), moved, 0)
    return lax.dynamic_update_index_in_dim(recent, shifted, layer, 0)
