"""Append of one new token a request to the recent window."""

import jax.numpy as jnp
from jax import Array


def append_recent(recent: Array, layer: Array, token: Array, recent_len: Array, active: Array) -> Array:
    """Write `token [R, K, d]` at slot `recent_len [R]` of a layer of `recent [L, R, K, N, d]`; nothing where not `active [R]`, or full."""
    slots = recent.shape[3]
    slot = jnp.where(active, recent_len, slots)
    requests, heads = (jnp.arange(n) for n in recent.shape[1:3])
    return recent.at[layer, requests[:, None], heads, slot[:, None]].set(token.astype(recent.dtype), mode="drop")
