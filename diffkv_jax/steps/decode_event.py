"""What happens after the last layer of a decode step: the clocks, and every `flush` steps the
compression event.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.admission import admit
from diffkv_jax.cache.cache import KVCache, Recent, with_counters
from diffkv_jax.cache.layer import LayerView, all_heads, layer_clock
from diffkv_jax.cache.pair_pages import pages_of_pairs
from diffkv_jax.cache.query_counts import extend_query_spans
from diffkv_jax.pallas_kernels.apply_event import Tokens
from diffkv_jax.pallas_kernels.branch import when
from diffkv_jax.pallas_kernels.recent_window import shift_recent
from diffkv_jax.steps.event import (
    Plan,
    apply_plan,
    entered,
    one_victim,
    plan_event,
    recent_tokens,
)
from diffkv_jax.steps.forget import forget
from diffkv_jax.steps.pairs import merge_pair
from diffkv_jax.steps.rescore import rescore_oldest, unmark
from diffkv_jax.steps.step import DecodeStep


def after_decode(cache: KVCache, step: DecodeStep) -> KVCache:
    """Count the new tokens; every `flush` steps run a compression event."""
    active = step.active.astype(jnp.int32)
    score = cache.policy.score
    scored = active if score is not None and score.accumulates else jnp.zeros_like(active)
    spec, now = cache.spec, cache.counters
    seq_len, recent_len, steps = (x + active for x in (now.seq_len, now.recent_len, now.steps))
    query_spans = extend_query_spans(now.query_spans, scored, seq_len)
    cache = with_counters(cache, seq_len=seq_len, query_spans=query_spans, steps=steps)
    if not spec.paged_layers:
        return with_counters(cache, recent_len=jnp.minimum(recent_len, spec.window))
    cache = with_counters(cache, recent_len=recent_len)
    # between events only after a pause
    full = (recent_len >= spec.window + spec.flush) & ~now.overflow
    due = step.active & ((steps % spec.flush == 0) | full)
    return when(due.any(), lambda cache: compress(cache, due), cache)


def compress(cache: KVCache, due: Array) -> KVCache:
    """One compression event over all layers and the requests that are `due` (bool [R]); one that
    has ended stays as it ended.

    All layers are planned before any is changed: a request whose new pages are not all free is left
    exactly as it was, with `overflow` set. The kernels take all layers at once, in a constant
    number of launches; plain XLA goes layer by layer, so that its intermediate arrays are those of
    one layer.
    """
    recent_len = cache.counters.recent_len
    leaving = jnp.where(due, recent_len - cache.spec.num_unquantized(recent_len), 0)  # the oldest
    if cache.policy.in_decode:
        cache = rescore_oldest(cache, leaving)
    if cache.spec.event_kernels.implementation == "xla":
        cache = _compress_by_layer(cache, leaving)
    else:
        cache = _compress_at_once(cache, leaving)
    return forget(unmark(cache), due & ~cache.counters.overflow, cache.spec.flush)


def _compress_at_once(cache: KVCache, leaving: Array) -> KVCache:
    view = LayerView(cache.spec, None)
    plan = _plan(cache, view, leaving)
    admitted = admit(view.by_request(plan.pages), cache.stored.ring.count)
    going = jnp.where(admitted, leaving, 0)
    return _ended(_carry_out(cache, view, plan, going), going, admitted, leaving)


def _compress_by_layer(cache: KVCache, leaving: Array) -> KVCache:
    spec, layers = cache.spec, cache.spec.unmerged_layers

    def count_pages(layer: Array, needed: Array) -> Array:
        view = LayerView(spec, layer)
        return needed + view.by_request(_plan(cache, view, leaving).pages)

    def change(layer: Array, cache: KVCache) -> KVCache:
        view = LayerView(spec, layer)
        return _carry_out(cache, view, _plan(cache, view, going), going)

    def merge(pair: Array, cache: KVCache) -> KVCache:
        return _merge(cache, LayerView(spec, layers + 2 * pair + 1), going)

    needed = lax.fori_loop(0, layers, count_pages, jnp.zeros(spec.num_requests, jnp.int32))
    if spec.pairs is not None:
        needed = needed + pages_of_pairs(cache, leaving)
    admitted = admit(needed, cache.stored.ring.count)
    going = jnp.where(admitted, leaving, 0)
    cache = lax.fori_loop(0, layers, change, cache)
    if spec.pairs is not None:
        cache = lax.fori_loop(0, spec.num_pairs, merge, cache)
    return _ended(cache, going, admitted, leaving)


def _ended(cache: KVCache, going: Array, admitted: Array, leaving: Array) -> KVCache:
    """The clocks after `going [R]` tokens have left each window; requests that were not `admitted`
    have overflowed.
    """
    overflow = cache.counters.overflow | (~admitted & (leaving > 0))
    recent_len = cache.counters.recent_len - going
    return with_counters(cache, recent_len=recent_len, overflow=overflow)


def _plan(cache: KVCache, view: LayerView, count: Array) -> Plan:
    """The plan of a layer when the oldest `count [R]` recent tokens of each request leave."""
    tokens, now = _oldest(cache, view), cache.counters
    exact, decides = now.recent_len - count, jnp.asarray(cache.policy.in_decode)
    clock = layer_clock(cache, view, now.seq_len, now.query_spans, exact, decides)
    leaving = jnp.arange(cache.spec.flush) < view.per_head(count)[:, None]
    return plan_event(cache, view, clock, tokens, leaving, one_victim=one_victim(cache))


def _oldest(cache: KVCache, view: LayerView) -> Tokens:
    """The recent tokens of each head of a layer, oldest first."""
    tokens, live = recent_tokens(cache, view)
    if cache.policy.in_decode and cache.policy.rescores:  # `rescore_oldest` has let them enter
        return tokens
    return entered(cache, view, tokens, live)


def _carry_out(cache: KVCache, view: LayerView, plan: Plan, going: Array) -> KVCache:
    """Let the oldest `going [R]` recent tokens of each request into the tiers of a layer as
    planned.
    """
    tokens, admitted = _oldest(cache, view), view.per_head(going > 0)
    cache = apply_plan(cache, view, plan, tokens, admitted, one_victim=one_victim(cache))
    return _shifted(cache, view, going)


def _merge(cache: KVCache, view: LayerView, going: Array) -> KVCache:
    """Let the oldest `going [R]` recent tokens of each request into the tiers of the pair whose
    second layer is viewed.
    """
    before = view.before()
    first, second = (_oldest(cache, layer) for layer in (before, view))
    leaving = jnp.arange(second.k.shape[1]) < view.per_head(going)[:, None]
    cache = merge_pair(cache, view, first, second, leaving)
    return _shifted(_shifted(cache, before, going), view, going)


def _shifted(cache: KVCache, view: LayerView, going: Array) -> KVCache:
    """The cache without the oldest `going [R]` recent tokens of a layer, once its tiers have
    them.
    """
    # always so, but the compiler cannot know: the windows change when the event has read them
    entered = cache.stored.ring.count >= 0
    recent = _without_oldest(cache, view, jnp.where(entered, going, 0))
    return dataclasses.replace(cache, recent=recent)


def _without_oldest(cache: KVCache, view: LayerView, going: Array) -> Recent:
    """The windows without the oldest `going [R]` tokens of each request, in a layer."""
    kernels = cache.spec.kernels
    # as they are: XLA copies what is reshaped on its way to a call that changes it
    if kernels.implementation == "cpu":

        def shift_layer(layer: Array, recent: Recent) -> Recent:
            shift = LayerView(cache.spec, layer).per_head(going)
            return Recent(*shift_recent(*recent, layer, shift, kernels=kernels))

        if view.layer is not None:
            return shift_layer(view.index, cache.recent)
        return lax.fori_loop(0, view.num_layers, shift_layer, cache.recent)
    flat = all_heads if view.layer is not None else lambda x: view.take(x)[None]
    at = jnp.int32(0) if view.layer is None else view.layer
    k, v, scores = map(flat, cache.recent)
    shifted = shift_recent(k, v, scores, at, view.per_head(going), kernels=kernels)
    return Recent(*(new.reshape(old.shape) for new, old in zip(shifted, cache.recent, strict=True)))
