"""Layers with a sliding window: a full-precision ring of the last `ring_len` tokens, never
compressed.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache, Sliding
from diffkv_jax.pallas_kernels.decode_attention.stream import soft_cap
from diffkv_jax.steps.step import DecodeStep, PrefillStep, ScoreStep

ROWS = 256  # query rows that one step holds


def window_layer(
    cache: KVCache,
    layer: Array,
    q: Array,
    k: Array,
    v: Array,
    step: DecodeStep | PrefillStep | ScoreStep,
) -> tuple[Array, KVCache]:
    """Attention of `q [R, T, num_q_heads, d]` over the ring and the T new tokens (right-aligned),
    which then enter the ring; those of a replay do not.

    `layer` counts sliding-window layers; a token sees itself and the `window - 1` before it.
    """
    spec = cache.spec
    length = step.active.astype(jnp.int32) if isinstance(step, DecodeStep) else step.length
    k, v = (jnp.moveaxis(x, 1, 2).astype(spec.dtype) for x in (k, v))  # [R, K, T, d]
    ring_k, ring_v = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache.sliding)
    new_position = _new_positions(cache.counters.seq_len, length, k.shape[2])
    ring_position = _ring_positions(cache.counters.seq_len, spec.ring_len)
    position = jnp.concatenate([ring_position, new_position], axis=1)
    windows = np.array([w for w in spec.attention.sliding_windows if w is not None], np.int32)
    keys, values = (
        jnp.concatenate(pair, axis=2).astype(jnp.float32) for pair in ((ring_k, k), (ring_v, v))
    )
    values = jnp.where((position >= 0)[:, None, :, None], values, 0)
    out = _attend(cache, q, keys, values, new_position, position, jnp.asarray(windows)[layer])
    if isinstance(step, ScoreStep):
        return out, cache
    seq_len = cache.counters.seq_len + length
    sliding = Sliding(
        _enter(cache.sliding.k, layer, k, new_position, seq_len),
        _enter(cache.sliding.v, layer, v, new_position, seq_len),
    )
    return out, dataclasses.replace(cache, sliding=sliding)


def _new_positions(seq_len: Array, length: Array, count: int) -> Array:
    """Positions `[R, count]` of right-aligned new tokens, -1 for padding."""
    index = jnp.arange(count) - (count - length[:, None])
    return jnp.where(index >= 0, seq_len[:, None] + index, -1)


def _ring_positions(seq_len: Array, ring_len: int) -> Array:
    """Position `[R, ring_len]` of the token in each slot, -1 for an empty one."""
    last = seq_len[:, None] - 1
    position = last - (last - jnp.arange(ring_len)) % ring_len
    return jnp.where((seq_len[:, None] > 0) & (position >= 0), position, -1)


def _attend(
    cache: KVCache,
    q: Array,
    keys: Array,
    values: Array,
    rows: Array,
    position: Array,
    window: Array,
) -> Array:
    """`q [R, T, Hq, d]` at positions `rows [R, T]` over `keys [R, K, n, d]` at `position [R, n]`,
    blocks of rows at a time.
    """
    attention = cache.spec.attention
    requests, count, _, d = q.shape
    grouped = q.reshape(requests, count, attention.num_kv_heads, -1, d).astype(jnp.float32)
    block = min(ROWS, count)

    def some_rows(i):
        part = lax.dynamic_slice_in_dim(grouped, i * block, block, axis=1)
        row = lax.dynamic_slice_in_dim(rows, i * block, block, axis=1)[:, :, None]
        logits = soft_cap(
            jnp.einsum("rtkgd,rknd->rkgtn", part, keys) * attention.sm_scale,
            attention.logits_soft_cap,
        )
        key = position[:, None, :]
        seen = (key >= 0) & (key <= row) & (key > row - window)
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
        peak = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
        total = weights.sum(axis=-1, keepdims=True)
        return jnp.einsum("rkgtn,rknd->rtkgd", weights / jnp.where(total > 0, total, 1.0), values)

    out = lax.map(some_rows, jnp.arange(count // block))  # [blocks, R, block, K, G, d]
    return jnp.moveaxis(out, 0, 1).reshape(q.shape).astype(q.dtype)


def _enter(ring: Array, layer: Array, new: Array, position: Array, seq_len: Array) -> Array:
    """Write the new tokens `[R, K, T, d]` that are among the last `ring_len` into slot `position %
    ring_len`.
    """
    ring_len = ring.shape[3]
    kept = (position >= 0) & (position >= seq_len[:, None] - ring_len)
    slot = jnp.where(kept, position % ring_len, ring_len)
    requests, heads = (jnp.arange(n) for n in ring.shape[1:3])
    return ring.at[layer, requests[:, None, None], heads[:, None], slot[:, None, :]].set(
        new, mode="drop"
    )
