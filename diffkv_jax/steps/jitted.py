"""The compiled calls that `generate` and `evaluation` are made of: one prompt chunk, one decode
step, one pass over a prompt.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import InChunk, KVCache, Waiting, complete, without_empty
from diffkv_jax.cache.pair_pages import pages_of_pairs
from diffkv_jax.cache.pool_size import most_pages
from diffkv_jax.cache.token_class import note_classes
from diffkv_jax.model import CausalLM
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.steps.decode_event import after_decode
from diffkv_jax.steps.forget import forget
from diffkv_jax.steps.passes import drop_least
from diffkv_jax.steps.rescore import reset_scores
from diffkv_jax.steps.step import DecodeStep, PrefillStep, ScoreStep
from diffkv_jax.steps.store_chunk import query_spans_after, recent_after, scoring_queries


@in_32_bits
def decode_step(
    model: CausalLM, params, cache: KVCache, token: Array, active: Array
) -> tuple[Array, KVCache]:
    """Feed `token` int32 [R] of the `active` requests (bool [R]): logits float32 [R, vocab] and the
    cache. Pure; call it under jit.
    """
    step = DecodeStep(active)
    positions = jnp.where(active, cache.counters.seq_len, -1)[:, None]
    cache = note_classes(complete(cache), token[:, None], positions)
    if cache.policy.in_decode:
        due = active & ((cache.counters.steps + 1) % cache.spec.flush == 0)
        cache = reset_scores(cache, due)
    logits, cache = model.apply({"params": params}, token[:, None], positions, cache, step)
    return logits[:, 0], without_empty(after_decode(cache, step))


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
@in_32_bits
def prefill_chunk(
    model: CausalLM, params, cache: KVCache, tokens: Array, length: Array, last: Array
) -> tuple[Array, KVCache]:
    """Feed a right-aligned chunk: `tokens` int32 [R, C], `length` int32 [R] of them real, `last`
    bool [] closes the prompt.

    Returns logits float32 [R, vocab] of the last token and the cache, which is donated.
    """
    return feed_chunk(model, params, cache, tokens, length, last | _runs_low(cache, length))


@in_32_bits
def feed_chunk(
    model: CausalLM, params, cache: KVCache, tokens: Array, length: Array, decides: Array
) -> tuple[Array, KVCache]:
    """`prefill_chunk`, whose caller says whether the policy `decides` (bool []) after this chunk.
    Pure; call it under jit.
    """
    cache, chunk_len, score = complete(cache), tokens.shape[1], cache.policy.score
    if score is not None and score.has_passes:  # then `end_passes` decides
        decides = jnp.asarray(False)
    step = PrefillStep(length, decides)
    index, positions = _places(cache, chunk_len, length)
    cache = note_classes(cache, tokens, positions)
    cache = reset_scores(cache, step.compress & (length > 0))
    coming = jnp.maximum(scoring_queries(cache, step, chunk_len), cache.spec.flush)
    cache = forget(cache, step.compress & (length > 0), coming)
    cache = _before_prefill(cache, index >= 0)
    logits, cache = model.apply({"params": params}, tokens, positions, cache, step, last_only=True)
    cache = _after_prefill(cache, step, chunk_len)
    cache = forget(cache, step.compress & (length > 0), cache.spec.flush)
    return logits[:, -1], without_empty(cache)


def _before_prefill(cache: KVCache, real: Array) -> KVCache:
    """The cache with what goes from layer to layer (`InChunk`); `real` bool [R, C] tokens."""
    spec, score = cache.spec, cache.policy.score
    hides = score is not None and score.hides_dropped
    waiting = None
    if spec.pairs is not None:
        slots = spec.window + spec.flush + real.shape[1]
        shape = (spec.num_heads, slots, spec.attention.head_dim)
        waiting = Waiting(jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype))
    in_chunk = InChunk(present=real if hides else None, waiting=waiting)
    return dataclasses.replace(cache, in_chunk=in_chunk)


def _after_prefill(cache: KVCache, step: PrefillStep, chunk_len: int) -> KVCache:
    """Count the chunk's tokens. A request that found no page in some layer holds none any more: it
    starts from nothing.
    """
    query_spans = query_spans_after(cache, step, chunk_len)
    now, read = cache.counters, step.length > 0
    counters = now._replace(
        seq_len=jnp.where(now.overflow, 0, now.seq_len + step.length),
        recent_len=jnp.where(now.overflow, 0, recent_after(cache, step)),
        query_spans=jnp.where(now.overflow[:, None, None], 0, query_spans),
        steps=jnp.where(read, 0, now.steps),
        pending=jnp.where(read, -1, now.pending),
    )
    return dataclasses.replace(cache, counters=counters, in_chunk=InChunk())


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
@in_32_bits
def score_pass(
    model: CausalLM, params, cache: KVCache, tokens: Array, length: Array, first: Array
) -> KVCache:
    """Score the prompt's tokens from position `first` int32 [] on by a right-aligned pass that goes
    over them again (`Score.passes`).

    `tokens` int32 [R, C], `length` int32 [R]. Returns the cache (donated), in which only scores
    have changed.
    """
    cache = complete(cache)
    step = ScoreStep(jnp.where(cache.counters.overflow, 0, length), first)
    _, positions = _places(cache, tokens.shape[1], step.length)
    _, cache = model.apply({"params": params}, tokens, positions, cache, step, last_only=True)
    return without_empty(cache)


@partial(jax.jit, donate_argnames="cache")
@in_32_bits
def end_passes(cache: KVCache, scored: Array) -> KVCache:
    """Drop what scored too low of the requests `scored` (bool [R]). The cache is donated."""
    return without_empty(drop_least(complete(cache), scored & ~cache.counters.overflow))


def _places(cache: KVCache, chunk_len: int, length: Array) -> tuple[Array, Array]:
    """Number of each row of a right-aligned chunk (negative: padded) and its position (-1: padded),
    int32 [R, C].
    """
    index = jnp.arange(chunk_len) - (chunk_len - length[:, None])
    return index, jnp.where(index >= 0, cache.counters.seq_len[:, None] + index, -1)


def _runs_low(cache: KVCache, length: Array) -> Array:
    """Whether the free pages may not take the chunk in the high tier: then the policy runs before
    the end of the prompt.

    Where a small pool has layers with unequal budgets it always does: a layer could not take its
    pages from later ones that hold more.
    """
    cache, spec = complete(cache), cache.spec
    pages = jnp.where(length > 0, spec.layout.pages_for(0, length) + 1, 0).sum()
    pages = pages * spec.unmerged_layers * spec.attention.num_kv_heads
    if spec.pairs is not None:
        seen = cache.counters.recent_len + length
        leaving = jnp.where(length > 0, seen - spec.num_unquantized(seen), 0)
        pages = pages + pages_of_pairs(cache, leaving).sum()
    low = cache.stored.ring.count < pages
    if spec.num_pages >= most_pages(spec, [spec.max_len] * spec.num_requests):
        return low
    return low | cache.policy.keep.uneven()
