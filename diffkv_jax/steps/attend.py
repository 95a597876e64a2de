"""`attend`: the one place where a model meets the cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.steps.decode import decode_layer
from diffkv_jax.steps.prefill import prefill_layer
from diffkv_jax.steps.sliding_window import window_layer
from diffkv_jax.steps.step import DecodeStep, PrefillStep, ScoreStep


@in_32_bits
def attend(
    cache: Any,
    layer: Array,
    q: Array,
    k: Array,
    v: Array,
    step: DecodeStep | PrefillStep | ScoreStep,
) -> tuple[Array, Any]:
    """Attention of one layer of one step over the cache, which takes the new tokens in.

    Args:
        cache: `KVCache` as it is before this layer; another object attends itself, by its
            `attend(layer, q, k, v)`, as the one of `calibrate` does.
        layer: int32 [], index of the layer in the model; may be traced.
        q: [R, T, num_q_heads, head_dim] after RoPE.
        k, v: [R, T, num_kv_heads, head_dim], K after RoPE; with `AttentionSpec.latent` V has no
            channels.
        step: `DecodeStep` (T = 1), `PrefillStep` (right-aligned chunk) or `ScoreStep` (likewise;
            its tokens are not taken in).

    Returns:
        The output [R, T, num_q_heads, head_dim (or latent)] in q's dtype, and the cache. Its
        `counters` change after the last layer only (`steps.jitted`).
    """
    if not isinstance(cache, KVCache):
        return cache.attend(layer, q, k, v)
    spec = cache.spec
    slot = jnp.asarray(_slots(spec))[layer]
    if not spec.window_layers:
        return _paged(cache, slot, q, k, v, step)
    if not spec.paged_layers:
        return window_layer(cache, slot, q, k, v, step)
    # Loops of no or one turn, not a condition: XLA updates the pool in place in a loop, but copies
    # it in the branches of a condition here.
    windowed = jnp.asarray([int(w is not None) for w in spec.attention.sliding_windows])[layer]
    state = (jnp.zeros_like(q), cache)
    state = lax.fori_loop(
        0, windowed, lambda _, state: window_layer(state[1], slot, q, k, v, step), state
    )
    return lax.fori_loop(
        0, 1 - windowed, lambda _, state: _paged(state[1], slot, q, k, v, step), state
    )


def kernels_of(cache: Any) -> Kernels:
    """The implementation that a model's own products run on: the cache's; plain XLA without a
    cache.
    """
    return cache.spec.kernels if isinstance(cache, KVCache) else XLA


def _paged(
    cache: KVCache,
    layer: Array,
    q: Array,
    k: Array,
    v: Array,
    step: DecodeStep | PrefillStep | ScoreStep,
) -> tuple[Array, KVCache]:
    """One step of a layer with global attention."""
    transform, attention = cache.policy.transform, cache.spec.attention
    heads = jax.tree.map(lambda x: x[layer], transform)  # [K, ...]
    group = q.shape[2] // k.shape[2]
    of_queries = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), heads)
    q, k = of_queries.queries(q, attention), heads.keys(k, attention)
    v = heads.values(v)
    if isinstance(step, DecodeStep):
        out, cache = decode_layer(cache, layer, q, k, v, step)
    else:
        out, cache = prefill_layer(cache, layer, q, k, v, step)
    return of_queries.output(out), cache


def _slots(spec: CacheSpec) -> np.ndarray:
    """Index of each layer of the model among those of its own kind."""
    slots = np.zeros(spec.attention.num_layers, np.int32)
    for layers in (spec.paged_layers, spec.window_layers):
        slots[list(layers)] = np.arange(len(layers))
    return slots
