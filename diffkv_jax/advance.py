"""What happens to the cache after the last layer of a step: the clocks, and in decode the compression event."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache import KVCache
from diffkv_jax.event import Plan, admit, apply_plan, plan_event
from diffkv_jax.layer_state import layer_clock, per_head, put_layer, stored_layer, take_layer, with_stored
from diffkv_jax.observed import count_observed
from diffkv_jax.pallas_kernels.compact import Tokens
from diffkv_jax.prefill_layer import observed_after, recent_after
from diffkv_jax.steps import DecodeStep, PrefillStep


def after_decode(cache: KVCache, step: DecodeStep) -> KVCache:
    """Count the new tokens; every `flush` steps run a compression event."""
    active = step.active.astype(jnp.int32)
    cache = dataclasses.replace(
        cache,
        seq_len=cache.seq_len + active,
        recent_len=cache.recent_len + active,
        observed=count_observed(cache.observed, active, cache.seq_len + active),
        steps=cache.steps + 1,
    )
    spec = cache.spec
    if not spec.paged_layers:
        return dataclasses.replace(cache, recent_len=jnp.minimum(cache.recent_len, spec.window))
    full = (cache.recent_len >= spec.window + spec.flush) & ~cache.overflow  # between events only after a pause
    due = (step.active & (cache.steps % spec.flush == 0)) | full
    return lax.cond(due.any(), lambda cache: compress(cache, due), lambda cache: cache, cache)


def after_prefill(cache: KVCache, step: PrefillStep, chunk_len: int) -> KVCache:
    """Count the chunk's tokens. A request that found no page in some layer holds none any more: it starts from nothing."""
    return dataclasses.replace(
        cache,
        seq_len=jnp.where(cache.overflow, 0, cache.seq_len + step.length),
        recent_len=jnp.where(cache.overflow, 0, recent_after(cache, step)),
        observed=jnp.where(cache.overflow[:, None, None], 0, observed_after(cache, step, chunk_len)),
        steps=jnp.int32(0),
    )


def compress(cache: KVCache, due: Array) -> KVCache:
    """One compression event over all layers and the requests that are `due` (bool [R]); one that has ended stays as it ended.

    All layers are planned before any is changed: a request whose new pages are not all free is left exactly as it was, with
    `overflow` set.
    """
    spec = cache.spec
    layers = len(spec.paged_layers)
    leaving = jnp.where(due, jnp.maximum(cache.recent_len - spec.window, 0), 0)  # always the oldest

    def count_pages(layer, needed):
        return needed + _plan(cache, layer, leaving).pages.reshape(spec.num_requests, -1).sum(axis=1)

    needed = lax.fori_loop(0, layers, count_pages, jnp.zeros(spec.num_requests, jnp.int32))
    admitted = admit(needed, cache.ring.count)
    going = jnp.where(admitted, leaving, 0)
    cache = lax.fori_loop(0, layers, lambda layer, cache: _compress_layer(cache, layer, going), cache)
    return dataclasses.replace(
        cache,
        recent_len=cache.recent_len - going,
        overflow=cache.overflow | (~admitted & (leaving > 0)),
    )


def _plan(cache: KVCache, layer: Array, count: Array) -> Plan:
    """The plan of a layer when the oldest `count [R]` recent tokens of each request leave."""
    tokens = _oldest(cache, layer)
    leaving = jnp.arange(cache.spec.flush) < per_head(cache, count)[:, None]
    clock = layer_clock(cache, layer, cache.seq_len, cache.observed)
    stored = stored_layer(cache, layer)
    return plan_event(cache.spec, stored, clock, tokens.significance, tokens.position, leaving, one_victim=cache.spec.flush == 1)


def _oldest(cache: KVCache, layer: Array) -> Tokens:
    """The oldest `flush` recent tokens of each head."""
    n = cache.spec.flush
    k, v = (take_layer(x, layer)[:, :n] for x in (cache.recent_k, cache.recent_v))
    if cache.spec.layout.scored:
        significance = take_layer(cache.recent_significance, layer)[:, :n]
    else:
        significance = jnp.zeros(k.shape[:2], jnp.float32)
    position = per_head(cache, cache.seq_len - cache.recent_len)[:, None] + jnp.arange(n)
    return Tokens(k, v, significance, position)


def _compress_layer(cache: KVCache, layer: Array, going: Array) -> KVCache:
    """Let the oldest `going [R]` recent tokens of each request into the tiers of a layer."""
    plan = _plan(cache, layer, going)
    stored = apply_plan(
        cache.spec.layout, stored_layer(cache, layer), plan, _oldest(cache, layer), per_head(cache, going > 0), pages_a_round=1
    )
    cache = with_stored(cache, layer, stored)
    shift = per_head(cache, going)
    cache = dataclasses.replace(cache, recent_k=_shifted(cache.recent_k, layer, shift), recent_v=_shifted(cache.recent_v, layer, shift))
    if cache.spec.layout.scored:
        cache = dataclasses.replace(cache, recent_significance=_shifted(cache.recent_significance, layer, shift))
    return cache


def _shifted(recent: Array, layer: Array, shift: Array) -> Array:
    """`recent [L, R, K, N, ...]` with the first `shift [B]` slots of a layer removed and zeros behind."""
    one = take_layer(recent, layer)
    slot = jnp.arange(one.shape[1]) + shift[:, None]
    shape = (*slot.shape, *(1,) * (one.ndim - 2))
    moved = jnp.take_along_axis(one, jnp.minimum(slot, one.shape[1] - 1).reshape(shape), axis=1)
    return put_layer(recent, layer, jnp.where((slot < one.shape[1]).reshape(shape), moved, 0))
