"""Prompts into the cache, chunk by chunk, and gone over again where a score has passes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.batching import chunks
from diffkv_jax.cache.cache import KVCache, with_counters
from diffkv_jax.interrupt import Held
from diffkv_jax.model import CausalLM
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.steps.jitted import end_passes, prefill_chunk, score_pass


class Read(NamedTuple):
    """What reading has come to."""

    logits: Array  # [R, vocab] of each request's last token so far
    whole: bool  # of the prompts' last tokens


@in_32_bits
def prefill(
    model: CausalLM, params, cache: KVCache, tokens: np.ndarray, lengths: np.ndarray, size: int
) -> tuple[Array, KVCache]:
    """Feed prompts `[R, N]` in chunks of `size`; logits [R, vocab] of each prompt's last token and
    the cache (donated).

    The arguments and errors are those of `read_prompts`.
    """
    held = Held(None, cache)
    read_prompts(model, params, held, tokens, lengths, size)
    return held.value.logits, held.cache


def read_prompts(
    model: CausalLM,
    params,
    held: Held,
    tokens: np.ndarray,
    lengths: np.ndarray,
    size: int,
    *,
    drops: bool = True,
) -> None:
    """Feed prompts `[R, N]` of `lengths` int [R] (0: the request rests) in chunks of `size`;
    `held.value` becomes a `Read`.

    A score with passes (`Score.passes`) goes over the first prompt of a request again, then drops
    (without `drops`, `end_passes` is left to the caller); later prompts stay as they are.

    Raises:
        ValueError: the policy drops tokens before they are encoded, and the prompt takes more than
            one chunk or is not the first; or going over a prompt again would outgrow the model's
            context or vocabulary.
    """
    spec, seen = held.cache.spec, np.asarray(held.cache.counters.seq_len)
    score = held.cache.policy.score if spec.paged_layers else None
    check_evicts_once(held.cache, seen, lengths, size)
    again = np.where(seen == 0, lengths, 0)
    if score is not None:
        score.check_prompts(spec.attention, again)
    held.cache = with_counters(held.cache, overflow=jnp.zeros_like(held.cache.counters.overflow))

    def read(
        _: Any, cache: KVCache, part: np.ndarray, real: np.ndarray, last: bool
    ) -> tuple[Read, KVCache]:
        logits, cache = prefill_chunk(
            model, params, cache, jnp.asarray(part), jnp.asarray(real), jnp.asarray(last)
        )
        return Read(logits, last), cache

    def read_again(found: Read, cache: KVCache, *part: Array) -> tuple[Read, KVCache]:
        return found, score_pass(model, params, cache, *part)

    count = -(-int(lengths.max()) // size)
    parts = chunks(tokens, lengths, size)
    for chunk in held.bar(parts, total=count, desc="reading", unit=" chunks"):
        before = held.value
        held.update(read, *chunk)
        # one chunk ahead of the device, so that Ctrl-C does not wait for all
        jax.block_until_ready(before)
    if score is not None and score.has_passes and again.any():
        passes = held.bar(score.passes(tokens, again), desc="going over it again", unit=" passes")
        for part, real, first in passes:
            held.update(read_again, jnp.asarray(part), jnp.asarray(real), jnp.int32(first))
        if drops:
            held.update(lambda found, cache: (found, end_passes(cache, jnp.asarray(again > 0))))


def check_evicts_once(cache: KVCache, seen: np.ndarray, lengths: np.ndarray, size: int) -> None:
    """Refuse prompts that would have stored tokens dropped which share numbers. `seen`, `lengths`
    int [R], `size` is that of a chunk.

    Raises:
        ValueError: a prompt of several chunks, or one after another.
    """
    spec = cache.spec
    if spec.layout.tokens_per_group == 1 or cache.policy.score is None:
        return
    rule = (
        f"{spec.layout.formats[0].name} shares numbers between tokens, so the policy drops tokens "
        f"before they are encoded"
    )
    if lengths.max() > size:
        raise ValueError(
            f"{rule}: a prompt of {lengths.max()} tokens must fit one chunk of "
            f"{size}; raise prefill_chunk"
        )
    if seen[lengths > 0].any():
        raise ValueError(
            f"{rule}, and this cache holds a prompt already; begin a new cache, or "
            f"take a codec for each token such as 'K4V4'"
        )
