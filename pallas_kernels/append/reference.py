"""The recent window: new tokens in, the oldest out."""

import jax.numpy as jnp
from jax import Array, lax


def append_recent(recent: Array, layer: Array, token: Array, slot: Array) -> Array:
    """Write `token [B, d]` at slot `slot [B]` of a layer of `recent [L, B, N, d]`; nothing where the slot is not in `[0, N)`."""
    slots = recent.shape[2]
    slot = jnp.where(slot >= 0, slot, slots)
    return recent.at[layer, jnp.arange(recent.shape[1]), slot].set(token.astype(recent.dtype), mode="drop")


def shift_recent(recent: Array, layer: Array, shift: Array) -> Array:
    """Remove the first `shift [B]` slots of a layer of `recent [L, B, N, ...]`; what is behind moves up, zeros follow."""
    one = lax.dynamic_index_in_dim(recent, layer, keepdims=False)
    slot = jnp.arange(one.shape[1]) + shift[:, None]
    shape = (*slot.shape, *(1,) * (one.ndim - 2))
    moved = jnp.take_along_axis(one, jnp.minimum(slot, one.shape[1] - 1).reshape(shape), axis=1)
    shifted = jnp.where((slot < one.shape[1]).reshape(shape), moved, 0)
    return lax.dynamic_update_index_in_dim(recent, shifted, layer, 0)
