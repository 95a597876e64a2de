"""Dense causal attention over the given tokens: the model without a cache, the yardstick."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NO_WINDOW = 2**30
"""A window that no context reaches: full attention, as data."""


def plain_attention(
    q: Float[Array, "B T num_q_heads head_dim"],
    k: Float[Array, "B T num_kv_heads head_dim"],
    v: Float[Array, "B T num_kv_heads value_dim"],
    positions: Int[Array, "B T"],
    window: Int[Array, ""],
    *,
    sm_scale: float,
    logits_soft_cap: float | None,
) -> Float[Array, "B T num_q_heads value_dim"]:
    """softmax(mask(cap(sm_scale * q kᵀ))) v, in float32 (arXiv:1706.03762, eq. 1).

    A query at position p sees keys at positions max(0, p - window + 1) .. p.

    Args:
        q: [B, T, num_q_heads, head_dim].
        k, v: [B, T, num_kv_heads, head_dim or value_dim]; query head n reads KV head n //
            (num_q_heads // num_kv_heads).
        positions: int32 [B, T]; rows at -1 are padding, never seen as keys, and give zeros.
        window: int32 scalar, tokens seen including the query's own; NO_WINDOW = all.
        sm_scale: factor on the scores.
        logits_soft_cap: c in c * tanh(score / c), or None.
    Returns:
        [B, T, num_q_heads, value_dim] in q's dtype.
    """
    batch, length, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.astype(jnp.float32).reshape(
        batch, length, num_kv_heads, num_q_heads // num_kv_heads, head_dim
    )
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32)) * sm_scale
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    seen = _visible(positions, window)[:, None, None, :, :]
    weights = _masked_softmax(scores, seen)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v.astype(jnp.float32))
    return out.reshape(*q.shape[:-1], v.shape[-1]).astype(q.dtype)


def _visible(positions: jax.Array, window: jax.Array) -> jax.Array:
    """Whether query row t may see key row s, bool [B, T, S]."""
    query, key = positions[:, :, None], positions[:, None, :]
    return (key >= 0) & (key <= query) & (key > query - window)


def _masked_softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Softmax over the last axis of the seen scores; zeros, not NaN, where nothing is seen."""
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    return weights / jnp.maximum(
        jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny
    )
