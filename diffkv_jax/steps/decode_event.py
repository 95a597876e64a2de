"""What happens after the last layer of a decode step: the clocks, and every `flush` steps the
compression event.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.admission import admit
from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import all_heads, layer_clock, per_head, take_layer
from diffkv_jax.cache.pair_pages import pages_of_pairs
from diffkv_jax.cache.query_counts import extend_query_spans
from diffkv_jax.pallas_kernels.apply_event import Tokens
from diffkv_jax.pallas_kernels.branch import when
from diffkv_jax.pallas_kernels.recent_window import shift_recent
from diffkv_jax.steps.event import Plan, apply_plan, entered, one_victim, plan_event
from diffkv_jax.steps.pairs import merge_pair
from diffkv_jax.steps.rescore import rescore_oldest, unmark
from diffkv_jax.steps.step import DecodeStep


def after_decode(cache: KVCache, step: DecodeStep) -> KVCache:
    """Count the new tokens; every `flush` steps run a compression event."""
    active = step.active.astype(jnp.int32)
    score = cache.policy.score
    scored = active if score is not None and score.accumulates else jnp.zeros_like(active)
    cache = dataclasses.replace(
        cache,
        seq_len=cache.seq_len + active,
        recent_len=cache.recent_len + active,
        query_spans=extend_query_spans(cache.query_spans, scored, cache.seq_len + active),
        steps=cache.steps + active,
    )
    spec = cache.spec
    if not spec.paged_layers:
        return dataclasses.replace(cache, recent_len=jnp.minimum(cache.recent_len, spec.window))
    # between events only after a pause
    full = (cache.recent_len >= spec.window + spec.flush) & ~cache.overflow
    due = step.active & ((cache.steps % spec.flush == 0) | full)
    return when(due.any(), lambda cache: compress(cache, due), cache)


def compress(cache: KVCache, due: Array) -> KVCache:
    """One compression event over all layers and the requests that are `due` (bool [R]); one that
    has ended stays as it ended.

    All layers are planned before any is changed: a request whose new pages are not all free is left
    exactly as it was, with `overflow` set. The kernels take all layers at once, in a constant
    number of launches; plain XLA goes layer by layer, so that its intermediate arrays are those of
    one layer.
    """
    # always the oldest
    leaving = jnp.where(due, cache.recent_len - cache.spec.num_unquantized(cache.recent_len), 0)
    if cache.policy.in_decode:
        cache = rescore_oldest(cache, leaving)
    if cache.spec.event_kernels.implementation == "xla":
        cache = _compress_by_layer(cache, leaving)
    else:
        cache = _compress_at_once(cache, leaving)
    return unmark(cache)


def _compress_at_once(cache: KVCache, leaving: Array) -> KVCache:
    spec, plan = cache.spec, _plan(cache, None, leaving)
    needed = plan.pages.reshape(len(spec.paged_layers), spec.num_requests, -1).sum(axis=(0, 2))
    admitted = admit(needed, cache.ring.count)
    going = jnp.where(admitted, leaving, 0)
    return _ended(_carry_out(cache, None, plan, going), going, admitted, leaving)


def _compress_by_layer(cache: KVCache, leaving: Array) -> KVCache:
    spec, layers = cache.spec, cache.spec.unmerged_layers

    def count_pages(layer: Array, needed: Array) -> Array:
        pages = _plan(cache, layer, leaving).pages
        return needed + pages.reshape(spec.num_requests, -1).sum(axis=1)

    def change(layer: Array, cache: KVCache) -> KVCache:
        return _carry_out(cache, layer, _plan(cache, layer, going), going)

    def merge(pair: Array, cache: KVCache) -> KVCache:
        return _merge(cache, layers + 2 * pair + 1, going)

    needed = lax.fori_loop(0, layers, count_pages, jnp.zeros(spec.num_requests, jnp.int32))
    if spec.pairs is not None:
        needed = needed + pages_of_pairs(cache, leaving)
    admitted = admit(needed, cache.ring.count)
    going = jnp.where(admitted, leaving, 0)
    cache = lax.fori_loop(0, layers, change, cache)
    if spec.pairs is not None:
        cache = lax.fori_loop(0, spec.num_pairs, merge, cache)
    return _ended(cache, going, admitted, leaving)


def _ended(cache: KVCache, going: Array, admitted: Array, leaving: Array) -> KVCache:
    """The clocks after `going [R]` tokens have left each window; requests that were not `admitted`
    have overflowed.
    """
    overflow = cache.overflow | (~admitted & (leaving > 0))
    return dataclasses.replace(cache, recent_len=cache.recent_len - going, overflow=overflow)


def _plan(cache: KVCache, layer: Array | None, count: Array) -> Plan:
    """The plan of a layer (all when None) when the oldest `count [R]` recent tokens of each request
    leave.
    """
    tokens, decides = _oldest(cache, layer), jnp.asarray(cache.policy.in_decode)
    exact = cache.recent_len - count
    clock = layer_clock(cache, layer, cache.seq_len, cache.query_spans, exact, decides)
    layers = clock.seq_len.shape[0] // cache.spec.num_heads
    leaving = jnp.arange(cache.spec.flush) < per_head(cache, count, layers)[:, None]
    return plan_event(cache, layer, clock, tokens, leaving, one_victim=one_victim(cache))


def _oldest(cache: KVCache, layer: Array | None) -> Tokens:
    """The recent tokens of each head of a layer (of all layers when None), oldest first."""
    k, v = (take_layer(x, layer) for x in (cache.recent_k, cache.recent_v))
    if cache.spec.layout.scored:
        significance = take_layer(cache.recent_significance, layer)
    else:
        significance = jnp.zeros(k.shape[:2], jnp.float32)
    slot, layers = jnp.arange(k.shape[1]), k.shape[0] // cache.spec.num_heads
    counters = (cache.seq_len - cache.recent_len, cache.recent_len)
    first, count = (per_head(cache, x, layers)[:, None] for x in counters)
    tokens = Tokens(k, v, significance, first + slot)
    if cache.policy.in_decode and cache.policy.rescores:  # `rescore_oldest` has let them enter
        return tokens
    return entered(cache, layer, tokens, slot < count)


def _carry_out(cache: KVCache, layer: Array | None, plan: Plan, going: Array) -> KVCache:
    """Let the oldest `going [R]` recent tokens of each request into the tiers of a layer (of all
    when None) as planned.
    """
    tokens = _oldest(cache, layer)
    admitted = per_head(cache, going > 0, tokens.k.shape[0] // cache.spec.num_heads)
    cache = apply_plan(cache, layer, plan, tokens, admitted, one_victim=one_victim(cache))
    return _shifted(cache, layer, going)


def _merge(cache: KVCache, layer: Array, going: Array) -> KVCache:
    """Let the oldest `going [R]` recent tokens of each request into the tiers of the pair whose
    second layer is `layer`.
    """
    first, second = (_oldest(cache, at) for at in (layer - 1, layer))
    leaving = jnp.arange(second.k.shape[1]) < per_head(cache, going)[:, None]
    cache = merge_pair(cache, layer, first, second, leaving)
    return _shifted(_shifted(cache, layer - 1, going), layer, going)


def _shifted(cache: KVCache, layer: Array | None, going: Array) -> KVCache:
    """The cache without the oldest `going [R]` recent tokens of a layer (of all when None), once
    its tiers have them.
    """
    # always so, but the compiler cannot know: the windows change when the event has read them
    entered = cache.ring.count >= 0
    recent_k, recent_v, significance = _without_oldest(cache, layer, jnp.where(entered, going, 0))
    return dataclasses.replace(
        cache, recent_k=recent_k, recent_v=recent_v, recent_significance=significance
    )


def _without_oldest(
    cache: KVCache, layer: Array | None, going: Array
) -> tuple[Array, Array, Array]:
    """The windows (K, V, significance) without the oldest `going [R]` tokens of each request, in a
    layer (in all when None).
    """
    kernels = cache.spec.kernels
    windows = cache.recent_k, cache.recent_v, cache.recent_significance
    # as they are: XLA copies what is reshaped on its way to a call that changes it
    if kernels.implementation == "cpu":
        shift = per_head(cache, going)

        def shift_layer(layer: Array, windows: tuple) -> tuple[Array, Array, Array]:
            k, v, scores = windows
            return shift_recent(k, v, scores, layer, shift, kernels=kernels)

        if layer is not None:
            return shift_layer(layer, windows)
        return lax.fori_loop(0, len(cache.spec.paged_layers), shift_layer, windows)
    k, v, scores = (
        all_heads(x) if layer is not None else take_layer(x, None)[None] for x in windows
    )
    shift = per_head(cache, going, k.shape[1] // cache.spec.num_heads)
    at = jnp.int32(0) if layer is None else layer
    shifted = shift_recent(k, v, scores, at, shift, kernels=kernels)
    recent_k, recent_v, significance = (
        new.reshape(old.shape) for new, old in zip(shifted, windows, strict=True)
    )
    return recent_k, recent_v, significance
