"""The compiled calls that `generate` and `evaluate` are made of: one prompt chunk, one decode
step.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import KVCache, complete, without_empty
from diffkv_jax.cache.pool_size import most_pages
from diffkv_jax.methods.kvzip_event import drop_least
from diffkv_jax.methods.pyramidinfer import begin_chunk, end_chunk
from diffkv_jax.methods.snapkv import forget
from diffkv_jax.model import CausalLM
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.policy.protect import note_classes
from diffkv_jax.steps.after import after_decode, after_prefill, before_prefill
from diffkv_jax.steps.pairs import pages_of_pairs
from diffkv_jax.steps.step import DecodeStep, PrefillStep, ReplayStep


@in_32_bits
def decode_step(
    model: CausalLM, params, cache: KVCache, token: Array, active: Array
) -> tuple[Array, KVCache]:
    """Feed `token` int32 [R] of the `active` requests (bool [R]): logits float32 [R, vocab] and the
    cache. Pure; call it under jit.
    """
    step = DecodeStep(active)
    positions = jnp.where(active, cache.seq_len, -1)[:, None]
    cache = note_classes(complete(cache), token[:, None], positions)
    if cache.spec.selection.in_decode:
        cache = forget(cache, jnp.any(active & ((cache.steps + 1) % cache.spec.flush == 0)))
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
    cache, chunk_len = complete(cache), tokens.shape[1]
    # else `end_replay` does
    decides = (
        last | _runs_low(cache, length)
        if cache.spec.selection.replay is None
        else jnp.asarray(False)
    )
    step = PrefillStep(length, decides)
    index, positions = _places(cache, chunk_len, length)
    cache = forget(note_classes(cache, tokens, positions), step.compress)
    cache = before_prefill(begin_chunk(cache, index >= 0), chunk_len)
    logits, cache = model.apply({"params": params}, tokens, positions, cache, step, last_only=True)
    return logits[:, -1], without_empty(after_prefill(end_chunk(cache), step, chunk_len))


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
@in_32_bits
def replay_chunk(
    model: CausalLM, params, cache: KVCache, tokens: Array, length: Array, first: Array
) -> KVCache:
    """Score the prompt's tokens from position `first` int32 [] on by a right-aligned pass that
    repeats them (`Replay.passes`).

    `tokens` int32 [R, C], `length` int32 [R]. Returns the cache (donated), in which only scores
    have changed.
    """
    cache = complete(cache)
    step = ReplayStep(jnp.where(cache.overflow, 0, length), first)
    _, positions = _places(cache, tokens.shape[1], step.length)
    return without_empty(
        model.apply({"params": params}, tokens, positions, cache, step, last_only=True)[1]
    )


@partial(jax.jit, donate_argnames="cache")
@in_32_bits
def end_replay(cache: KVCache, replayed: Array) -> KVCache:
    """Drop what scored too low of the requests `replayed` (bool [R]). The cache is donated."""
    return without_empty(drop_least(complete(cache), replayed & ~cache.overflow))


def _places(cache: KVCache, chunk_len: int, length: Array) -> tuple[Array, Array]:
    """Number of each row of a right-aligned chunk (negative: padded) and its position (-1: padded),
    int32 [R, C].
    """
    index = jnp.arange(chunk_len) - (chunk_len - length[:, None])
    return index, jnp.where(index >= 0, cache.seq_len[:, None] + index, -1)


def _runs_low(cache: KVCache, length: Array) -> Array:
    """Whether the free pages may not take the chunk in the high tier: then the policy runs before
    the end of the prompt.

    Where a small pool has layers with unequal budgets it always does: a layer could not take its
    pages from later ones that hold more.
    """
    spec = cache.spec
    pages = jnp.where(length > 0, spec.layout.pages_for(0, length) + 1, 0).sum()
    pages = pages * spec.unmerged_layers * spec.attention.num_kv_heads
    if spec.merge is not None:
        seen = cache.recent_len + length
        pages = (
            pages + pages_of_pairs(cache, jnp.where(length > 0, seen - spec.staying(seen), 0)).sum()
        )
    low = cache.ring.count < pages
    if not spec.selection.budgeted or spec.num_pages >= most_pages(
        spec, [spec.max_len] * spec.num_requests
    ):
        return low
    return low | jnp.any(cache.limits[..., 1] != cache.limits[:1, ..., 1])
