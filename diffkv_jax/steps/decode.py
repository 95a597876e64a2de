"""One decode step of a paged layer: append to the recent window, attend, accumulate
significance.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import (
    all_heads,
    layer_heads,
    layer_layout,
    per_head,
    put_layer,
    take_layer,
)
from diffkv_jax.pallas_kernels.decode_attention import decode_attention
from diffkv_jax.pallas_kernels.recent_window import append_recent
from diffkv_jax.steps.step import DecodeStep


def decode_layer(
    cache: KVCache, layer: Array, q: Array, k: Array, v: Array, step: DecodeStep
) -> tuple[Array, KVCache]:
    """`q [R, 1, num_q_heads, d]`, `k`, `v [R, 1, num_kv_heads, d]` to the output and the cache;
    `layer` counts paged layers.
    """
    spec = cache.spec
    cache = _append(cache, layer, k, v, step)
    heads = layer_heads(cache, layer, cache.recent_len + step.active)
    layout = layer_layout(cache, layer, learned=spec.kernels.implementation == "xla")
    live = per_head(cache, step.active)
    scores_too = cache.policy.score is not None and cache.policy.score.accumulates
    heads = heads._replace(
        tier_len=jnp.where(live[:, None], heads.tier_len, 0),
        recent_len=jnp.where(live, heads.recent_len, 0),
    )
    out, significance, recent_scores = decode_attention(
        q.reshape(spec.num_heads, -1, spec.attention.head_dim),
        cache.pages
        if scores_too
        else dataclasses.replace(cache.pages, significance=cache.pages.significance[:, :0]),
        layout if scores_too else dataclasses.replace(layout, scored=False),
        heads,
        max_len=spec.max_len,
        sm_scale=spec.attention.sm_scale,
        logits_soft_cap=spec.attention.logits_soft_cap,
        kernels=spec.kernels,
    )
    if scores_too:
        scores = take_layer(cache.recent_significance, layer) + recent_scores
        cache = dataclasses.replace(
            cache,
            pages=dataclasses.replace(cache.pages, significance=significance),
            recent_significance=put_layer(cache.recent_significance, layer, scores),
        )
    return out.reshape(*q.shape[:-1], -1).astype(q.dtype), cache


def _append(cache: KVCache, layer: Array, k: Array, v: Array, step: DecodeStep) -> KVCache:
    """The new K and V `[R, 1, num_kv_heads, d]` of the active requests in the layer's recent
    window.
    """
    kernels, heads = cache.spec.kernels, cache.spec.num_heads
    k, v = (x.reshape(heads, x.shape[-1]) for x in (k, v))
    slot = per_head(cache, jnp.where(step.active, cache.recent_len, -1))
    # XLA copies what is reshaped on its way into a native call
    flatten = all_heads if kernels.implementation != "cpu" else lambda x: x
    recent_k, recent_v = append_recent(
        flatten(cache.recent_k), flatten(cache.recent_v), layer, k, v, slot, kernels=kernels
    )
    shapes = cache.recent_k.shape, cache.recent_v.shape
    return dataclasses.replace(
        cache, recent_k=recent_k.reshape(shapes[0]), recent_v=recent_v.reshape(shapes[1])
    )
