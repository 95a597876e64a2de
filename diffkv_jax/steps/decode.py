"""One decode step of a paged layer: append to the recent window, attend, accumulate
significance.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import KVCache, with_significance
from diffkv_jax.cache.layer import LayerView, all_heads, layer_heads, layer_layout
from diffkv_jax.pallas_kernels.decode_attention import decode_attention
from diffkv_jax.pallas_kernels.recent_window import append_recent
from diffkv_jax.steps.step import DecodeStep


def decode_layer(
    cache: KVCache, layer: Array, q: Array, k: Array, v: Array, step: DecodeStep
) -> tuple[Array, KVCache]:
    """`q [R, 1, num_q_heads, d]`, `k`, `v [R, 1, num_kv_heads, d]` to the output and the cache;
    `layer` counts paged layers.
    """
    spec, view = cache.spec, LayerView(cache.spec, layer)
    cache = _append(cache, view, k, v, step)
    heads = layer_heads(cache, view, cache.counters.recent_len + step.active)
    layout = layer_layout(cache, view, learned=spec.kernels.implementation == "xla")
    live = view.per_head(step.active)
    scores_too = cache.policy.score is not None and cache.policy.score.accumulates
    heads = heads._replace(
        tier_len=jnp.where(live[:, None], heads.tier_len, 0),
        recent_len=jnp.where(live, heads.recent_len, 0),
    )
    pages = cache.stored.pages
    if not scores_too:
        pages = dataclasses.replace(pages, significance=pages.significance[:, :0])
        layout = dataclasses.replace(layout, scored=False)
    out, significance, recent_scores = decode_attention(
        q.reshape(spec.num_heads, -1, spec.attention.head_dim),
        pages,
        layout,
        heads,
        max_len=spec.max_len,
        sm_scale=spec.attention.sm_scale,
        logits_soft_cap=spec.attention.logits_soft_cap,
        kernels=spec.kernels,
    )
    if scores_too:
        scores = view.take(cache.recent.significance) + recent_scores
        recent = view.put(cache.recent.significance, scores)
        cache = with_significance(cache, significance, recent)
    return out.reshape(*q.shape[:-1], -1).astype(q.dtype), cache


def _append(cache: KVCache, view: LayerView, k: Array, v: Array, step: DecodeStep) -> KVCache:
    """The new K and V `[R, 1, num_kv_heads, d]` of the active requests in the layer's recent
    window.
    """
    kernels, recent = cache.spec.kernels, cache.recent
    k, v = (x.reshape(cache.spec.num_heads, x.shape[-1]) for x in (k, v))
    slot = view.per_head(jnp.where(step.active, cache.counters.recent_len, -1))
    # XLA copies what is reshaped on its way into a native call
    flatten = all_heads if kernels.implementation != "cpu" else lambda x: x
    windows = flatten(recent.k), flatten(recent.v)
    windows = append_recent(*windows, view.index, k, v, slot, kernels=kernels)
    k, v = (new.reshape(old.shape) for new, old in zip(windows, recent[:2], strict=True))
    return dataclasses.replace(cache, recent=recent._replace(k=k, v=v))
