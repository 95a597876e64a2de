"""What happens to the cache after the last layer of a step: the clocks, and in decode the
compression event.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache, Waiting
from diffkv_jax.cache.layer import (
    all_heads,
    head_numbers,
    layer_clock,
    per_head,
    stored_layer,
    take_layer,
    unmerged_layout,
    with_stored,
)
from diffkv_jax.cache.query_counts import count_observed
from diffkv_jax.methods.fastgen import mark_all, unmark
from diffkv_jax.pallas_kernels.apply_event import Tokens
from diffkv_jax.pallas_kernels.branch import when
from diffkv_jax.pallas_kernels.recent_window import shift_recent
from diffkv_jax.policy.protect import protected_tokens
from diffkv_jax.policy.selection import ranked_tokens
from diffkv_jax.steps.event import Plan, admit, apply_plan, plan_event
from diffkv_jax.steps.pairs import merge_pair, pages_of_pairs
from diffkv_jax.steps.prefill import observed_after, recent_after
from diffkv_jax.steps.step import DecodeStep, PrefillStep


def after_decode(cache: KVCache, step: DecodeStep) -> KVCache:
    """Count the new tokens; every `flush` steps run a compression event."""
    active = step.active.astype(jnp.int32)
    cache = dataclasses.replace(
        cache,
        seq_len=cache.seq_len + active,
        recent_len=cache.recent_len + active,
        observed=count_observed(cache.observed, active, cache.seq_len + active),
        steps=cache.steps + active,
    )
    spec = cache.spec
    if not spec.paged_layers:
        return dataclasses.replace(cache, recent_len=jnp.minimum(cache.recent_len, spec.window))
    # between events only after a pause
    full = (cache.recent_len >= spec.window + spec.flush) & ~cache.overflow
    due = step.active & ((cache.steps % spec.flush == 0) | full)
    return when(due.any(), lambda cache: compress(cache, due), cache)


def before_prefill(cache: KVCache, chunk_len: int) -> KVCache:
    """The cache, where layers are merged with room for what one of a pair lets go until the other
    has its own.
    """
    if cache.spec.merge is None:
        return cache
    shape = (
        cache.spec.num_heads,
        cache.spec.window + cache.spec.flush + chunk_len,
        cache.spec.attention.head_dim,
    )
    return dataclasses.replace(
        cache,
        waiting=Waiting(jnp.zeros(shape, cache.spec.dtype), jnp.zeros(shape, cache.spec.dtype)),
    )


def after_prefill(cache: KVCache, step: PrefillStep, chunk_len: int) -> KVCache:
    """Count the chunk's tokens. A request that found no page in some layer holds none any more: it
    starts from nothing.
    """
    return dataclasses.replace(
        cache,
        seq_len=jnp.where(cache.overflow, 0, cache.seq_len + step.length),
        recent_len=jnp.where(cache.overflow, 0, recent_after(cache, step)),
        observed=jnp.where(
            cache.overflow[:, None, None], 0, observed_after(cache, step, chunk_len)
        ),
        steps=jnp.where(step.length > 0, 0, cache.steps),
        pending=jnp.where(step.length > 0, -1, cache.pending),
        waiting=None,
    )


def compress(cache: KVCache, due: Array) -> KVCache:
    """One compression event over all layers and the requests that are `due` (bool [R]); one that
    has ended stays as it ended.

    All layers are planned before any is changed: a request whose new pages are not all free is left
    exactly as it was, with `overflow` set. The kernels take all layers at once, in a constant
    number of launches; plain XLA goes layer by layer, so that its intermediate arrays are those of
    one layer.
    """
    # always the oldest
    leaving = jnp.where(due, cache.recent_len - cache.spec.staying(cache.recent_len), 0)
    if cache.spec.selection.profiled:
        return unmark(_compress(mark_all(cache, leaving), leaving))
    return _compress(cache, leaving)


def _compress(cache: KVCache, leaving: Array) -> KVCache:
    if cache.spec.event_kernels.implementation == "xla":
        return _compress_by_layer(cache, leaving)
    plan = _plan(cache, None, leaving)
    needed = plan.pages.reshape(len(cache.spec.paged_layers), cache.spec.num_requests, -1).sum(
        axis=(0, 2)
    )
    admitted = admit(needed, cache.ring.count)
    going = jnp.where(admitted, leaving, 0)
    return _ended(_carry_out(cache, None, plan, going), going, admitted, leaving)


def _compress_by_layer(cache: KVCache, leaving: Array) -> KVCache:
    spec, layers = cache.spec, cache.spec.unmerged_layers

    def count_pages(layer, needed):
        return needed + _plan(cache, layer, leaving).pages.reshape(spec.num_requests, -1).sum(
            axis=1
        )

    needed = lax.fori_loop(0, layers, count_pages, jnp.zeros(spec.num_requests, jnp.int32))
    if spec.merge is not None:
        needed = needed + pages_of_pairs(cache, leaving)
    admitted = admit(needed, cache.ring.count)
    going = jnp.where(admitted, leaving, 0)
    cache = lax.fori_loop(
        0,
        layers,
        lambda layer, cache: _carry_out(cache, layer, _plan(cache, layer, going), going),
        cache,
    )
    if spec.merge is not None:
        cache = lax.fori_loop(
            0, spec.pairs, lambda pair, cache: _merge(cache, layers + 2 * pair + 1, going), cache
        )
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
    tokens = _oldest(cache, layer)
    decides = jnp.asarray(cache.spec.selection.in_decode)
    clock = layer_clock(
        cache, layer, cache.seq_len, cache.observed, cache.recent_len - count, decides
    )
    layers = clock.seq_len.shape[0] // cache.spec.num_heads
    spec, n = cache.spec.unmerged, cache.spec.flush
    leaving = jnp.arange(n) < per_head(cache, count, layers)[:, None]
    stored = stored_layer(cache, layer)
    return plan_event(
        spec,
        stored,
        clock,
        tokens.significance[:, :n],
        tokens.position[:, :n],
        leaving,
        spec.one_victim,
    )


def _oldest(cache: KVCache, layer: Array | None) -> Tokens:
    """The recent tokens of each head of a layer (of all layers when None), oldest first."""
    k, v = (take_layer(x, layer) for x in (cache.recent_k, cache.recent_v))
    if cache.spec.layout.scored:
        significance = take_layer(cache.recent_significance, layer)
    else:
        significance = jnp.zeros(k.shape[:2], jnp.float32)
    slot, layers = jnp.arange(k.shape[1]), k.shape[0] // cache.spec.num_heads
    first, count = (
        per_head(cache, x, layers)[:, None]
        for x in (cache.seq_len - cache.recent_len, cache.recent_len)
    )
    tokens, valid = Tokens(k, v, significance, first + slot), slot < count
    protected = protected_tokens(cache, tokens.position)
    return ranked_tokens(
        cache.spec.selection,
        tokens,
        valid,
        head_numbers(cache, layer),
        protected,
        cache.spec.attention.latent,
    )


def _carry_out(cache: KVCache, layer: Array | None, plan: Plan, going: Array) -> KVCache:
    """Let the oldest `going [R]` recent tokens of each request into the tiers of a layer (of all
    when None) as planned.
    """
    spec, tokens = cache.spec.unmerged, _oldest(cache, layer)
    going_on = per_head(cache, going > 0, tokens.k.shape[0] // spec.num_heads)
    stored = apply_plan(
        spec,
        unmerged_layout(cache, layer),
        stored_layer(cache, layer),
        plan,
        tokens,
        going_on,
        one_victim=spec.one_victim,
    )
    return _shifted(with_stored(cache, layer, stored), layer, going)


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
    kernels, windows = (
        cache.spec.kernels,
        (cache.recent_k, cache.recent_v, cache.recent_significance),
    )
    # as they are: XLA copies what is reshaped on its way to a call that changes it
    if kernels.implementation == "cpu":
        shift = per_head(cache, going)

        def shift_layer(
            layer: Array, windows: tuple[Array, Array, Array]
        ) -> tuple[Array, Array, Array]:
            k, v, scores = windows
            return shift_recent(k, v, scores, layer, shift, kernels=kernels)

        if layer is not None:
            return shift_layer(layer, windows)
        return lax.fori_loop(0, len(cache.spec.paged_layers), shift_layer, windows)
    k, v, scores = (
        all_heads(x) if layer is not None else take_layer(x, None)[None] for x in windows
    )
    shift = per_head(cache, going, k.shape[1] // cache.spec.num_heads)
    shifted = shift_recent(
        k, v, scores, jnp.int32(0) if layer is None else layer, shift, kernels=kernels
    )
    recent_k, recent_v, significance = (
        new.reshape(old.shape) for new, old in zip(shifted, windows, strict=True)
    )
    return recent_k, recent_v, significance
