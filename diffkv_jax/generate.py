"""`generate`: prompts in, tokens and the compressed cache out.

With native kernels a batch row has, bit for bit, the numbers of the same request alone (with
`Sample`, when it has the same key: a draw depends on the key and on the token's position; under a
budget, unless the pool runs low: then the batch's prompts are compressed earlier). With plain XLA
and Pallas kernels, where the model's products are XLA's, and in layers with a sliding window, they
are the same within rounding, so that a token may differ.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.arguments import flag, instance, integer
from diffkv_jax.batching import Prompts, as_prompts, check_context, chunk_size
from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.claim import claimed
from diffkv_jax.cache.pool_size import check_pool
from diffkv_jax.calibration.calibration import fingerprint
from diffkv_jax.decode_loop import FINISH_REASONS, Requests, State, begin, decode
from diffkv_jax.inputs import (
    as_params,
    as_samplings,
    check_model,
    check_outside_jit,
    request_keys,
    stop_ids,
)
from diffkv_jax.interrupt import Held
from diffkv_jax.make_cache import CacheOptions, cache_for, check_options
from diffkv_jax.model import AttentionSpec, CausalLM
from diffkv_jax.not_finite import warn_of_errors
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.read_prompts import Read, read_prompts
from diffkv_jax.sampling import Greedy, Sample, rules

# tokens that the decode loop has room for: programs are compiled by powers of two from here on
LEAST_WIDTH = 128


@dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns.

    Attributes:
        tokens: int32 [R, max_new_tokens], generated ids, a stop id included; zeros behind
            `lengths`.
        lengths: int32 [R], how many were generated.
        finish_reason: per request "eos"; "length"; "cache_full" (the pool had no page left for it;
            with `lengths` 0 its prompt did not fit, and the cache holds nothing of it any more,
            earlier turns included); "error" (its logits were not finite; a warning says in which
            layer that began); "resting" (None was given for its prompt); "interrupted" (Ctrl-C).
        cache: the compressed cache; give it to the next call to go on. It is donated there. The
            token generated last has not been seen by the model: it waits in
            `cache.counters.pending` and goes before the next prompt by itself, so do not give it
            again.
        prefill_seconds: wall time until the prompts were in the cache, compilation included.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finish_reason: tuple[str, ...]
    cache: KVCache
    prefill_seconds: float


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C in `generate`. `output` is what there was by then, and its cache can be gone on from.

    An empty prompt continues a request that had begun to generate; of one that was still being
    read, `output.cache.counters.seq_len` tokens in all are in the cache, and the next prompt may be
    the rest. A policy that goes over the first prompt again (`kvzip`) and had not begun to drop
    keeps all of it.
    """

    def __init__(self, output: GenerateOutput):
        super().__init__(
            "generate was interrupted; .output has the tokens so far and the cache to go on from"
        )
        self.output = output


@in_32_bits
def generate(
    model: CausalLM,
    params: Any,
    tokens: Any,
    lengths: Sequence[int] | np.ndarray | None = None,
    *,
    attention_mask: Any = None,
    max_new_tokens: int = 128,
    sampling: Greedy | Sample | Mapping | str | Sequence | None = None,
    key: Array | int | None = None,
    stop_token_ids: Sequence[int] | None = None,
    prefill_chunk: int = 1024,
    progress: bool | None = None,
    cache: KVCache | None = None,
    **options: Unpack[CacheOptions],
) -> GenerateOutput:
    """Continue prompts with a compressed KV cache. Several calls with a cache give the tokens of
    one call.

    Args:
        model: satisfies `CausalLM`; static, so reuse the object. `params` are its parameters.
        tokens: int [R, N] right-padded with `lengths` int [R]; a list of prompts (lists of token
            ids, or a tokenizer's encodings); or a tokenizer's encoding of one or more texts. With
            `cache`, an empty prompt goes on from the token generated last, None lets a request
            rest.
        attention_mask: 0 or 1 for each of `tokens`, padded left or right, in place of `lengths`.
        max_new_tokens: most tokens to generate; 0 only reads the prompts.
        sampling: `Greedy()` (default) or `Sample(...)`, or one a request. It compiles nothing.
        key: a seed or a random key (request i draws with `fold_in(key, i)`), or one key a request
            `[R]`; needed by `Sample`.
        stop_token_ids: tokens that end a request with "eos"; the model's when None, `()` for none.
        prefill_chunk: tokens of a prompt's chunk, a power of two; a prompt of one is attended
            exactly.
        progress: show what is read and generated; None: where standard error is a terminal.
        cache: from an earlier call, to go on from. Donated.
        options: what a new cache is made with (`CacheOptions`): `policy`, `memory_budget`, ...

    Raises:
        TypeError, ValueError: bad input, named, before anything is computed; a given cache is as it
            was.
        GenerationInterrupted: Ctrl-C, with what there was by then.
    """
    check_model("generate", model)
    params = as_params("generate", params)
    check_outside_jit("generate", tokens, lengths, attention_mask, key, cache, stop_token_ids)
    most = integer("max_new_tokens", max_new_tokens, least=0)
    chunk = integer("prefill_chunk", prefill_chunk)
    progress = None if progress is None else flag("progress", progress)
    prompts = as_prompts(tokens, lengths, attention_mask, model.attention.vocab_size)
    samplings = as_samplings(sampling, len(prompts.lengths))
    keys, stop = request_keys(samplings, key, len(samplings)), stop_ids(stop_token_ids, model)
    asked = Requests(rules(samplings), keys, jnp.int32(most), stop)
    cache = _new_or_given(model, params, prompts, most, chunk, cache, options)
    with claimed(cache):
        cache = _fingerprinted(cache, model, params)
        joined, size = _joined(cache, prompts, most, chunk)
        return _warned(_run(model, params, Held(None, cache, progress), joined, size, asked, most))


def _new_or_given(
    model: CausalLM,
    params,
    prompts: Prompts,
    most: int,
    chunk: int,
    cache: KVCache | None,
    options: CacheOptions,
) -> KVCache:
    """The cache that was given, or a new one with room for the prompts and `most` more tokens."""
    if cache is None:
        requests = len(prompts.lengths)
        _check_empty(prompts, np.full(requests, -1))
        totals = _totals(np.zeros(requests, np.int64), prompts, most)
        return cache_for(model, params, totals, int(prompts.lengths.max()), chunk, options)
    instance("cache", cache, KVCache, "an earlier call returned one as its .cache")
    _check_owner(cache, model.attention, prompts)
    check_options(options, "a cache keeps what the call that made it said")
    return cache


def _warned(out: GenerateOutput) -> GenerateOutput:
    """`out`, with a warning of its requests that ended with "error"."""
    failed = [i for i, reason in enumerate(out.finish_reason) if reason == "error"]
    try:
        warn_of_errors(out.cache, failed, stacklevel=5)  # in_32_bits, generate, _warned
    except RuntimeWarning as warning:
        # where warnings are errors: the other requests and the cache are not lost
        warning.output = out  # pyright: ignore[reportAttributeAccessIssue]
        raise
    return out


def _run(
    model: CausalLM, params, held: Held, prompts: Prompts, size: int, asked: Requests, most: int
) -> GenerateOutput:
    """Read the prompts in chunks of `size` and generate up to `most` tokens of each that does not
    rest.
    """
    fresh, began = prompts.lengths > 0, time.perf_counter()
    seconds, width = 0.0, 1 << (max(most, LEAST_WIDTH) - 1).bit_length()
    where = jnp.asarray(fresh), jnp.asarray(prompts.rests)

    def start(read: Read | None, cache: KVCache) -> tuple[State, KVCache]:
        return begin(cache, read and read.logits, *where, asked, width)

    with held:
        try:
            if fresh.any():
                read_prompts(model, params, held, prompts.tokens, prompts.lengths, size)
                jax.block_until_ready(held.value)
            seconds = time.perf_counter() - began
            held.update(start)
            decode(model, params, held, asked)
            return _output(held, prompts.rests, most, seconds)
        except KeyboardInterrupt:
            held.close()
            if isinstance(held.value, Read) and held.value.whole:
                held.update(start)  # without a first token there would be nothing to go on from
            raise GenerationInterrupted(_output(held, prompts.rests, most, seconds)) from None


def _output(held: Held, rests: np.ndarray, most: int, seconds: float) -> GenerateOutput:
    """What there is now: of requests whose prompts are being read, nothing."""
    if isinstance(held.value, State):
        tokens, lengths, codes = jax.device_get(held.value)
        reasons = tuple(FINISH_REASONS[code] for code in codes)
    else:
        tokens, lengths = np.zeros((len(rests), most), np.int32), np.zeros(len(rests), np.int32)
        reasons = tuple("resting" if rest else "interrupted" for rest in rests)
    return GenerateOutput(tokens[:, :most], lengths, reasons, held.cache, seconds)


def _totals(seen: np.ndarray, prompts: Prompts, max_new_tokens: int) -> np.ndarray:
    """Tokens int64 [R] that each request may come to; the last one generated is not fed."""
    fed = prompts.lengths.astype(np.int64) + max(max_new_tokens - 1, 0)
    return seen.astype(np.int64) + np.where(prompts.rests, 0, fed)


def _check_empty(prompts: Prompts, pending: np.ndarray) -> None:
    """Refuse empty prompts of requests that have no token to go on from: `pending` int [R]."""
    for i in np.flatnonzero((prompts.lengths == 0) & ~prompts.rests & (pending < 0)):
        raise ValueError(
            f"prompt {i} has length 0 and no generated token is pending in the cache that it "
            f"could go on from: give at least one token, "
            "or None to let the request rest (empty prompt?)"
        )
    if prompts.rests.all():
        raise ValueError(
            "every prompt is None, so that all requests rest: give one of them a prompt"
        )


def _check_owner(cache: KVCache, attention: AttentionSpec, prompts: Prompts) -> None:
    if cache.spec.attention != attention:
        raise ValueError(
            f"the cache was made for another model: {cache.spec.attention}, given "
            f"{attention}; use the model that made it"
        )
    if len(prompts.lengths) != cache.spec.num_requests:
        raise ValueError(
            f"the cache holds {cache.spec.num_requests} requests, given {len(prompts.lengths)} "
            f"prompts; they must match row by row"
        )


def _fingerprinted(cache: KVCache, model: CausalLM, params) -> KVCache:
    """The cache, marked as made with these parameters.

    Raises:
        ValueError: it was made with others.
    """
    had, found = (
        np.asarray(cache.fingerprint),
        np.frombuffer(bytes.fromhex(fingerprint(model, params)), np.uint8),
    )
    if not had.any():
        return replace(cache, fingerprint=jnp.asarray(found))
    if (had != found).any():
        raise ValueError(
            "the cache was made with other parameters of this geometry, to which its "
            "keys and values mean nothing: use those"
        )
    return cache


def _joined(
    cache: KVCache, prompts: Prompts, max_new_tokens: int, prefill_chunk: int
) -> tuple[Prompts, int]:
    """Prompts that go on from `cache`, each with the token that was sampled last (the model has not
    seen it) put before it, and the length of their chunks.

    Raises:
        ValueError: they do not fit the model's context, the cache or its pool.
    """
    pending = np.asarray(cache.counters.pending)
    _check_empty(prompts, pending)
    totals = _totals(
        np.asarray(cache.counters.seq_len),
        prompts._replace(lengths=prompts.lengths + (pending >= 0)),
        max_new_tokens,
    )
    check_context(cache.spec.attention, totals, cache.spec.max_len)
    check_pool(cache, [int(n) for n in totals])
    had = ((pending >= 0) & (prompts.lengths > 0)).astype(np.int32)
    batch = np.zeros((len(had), prompts.tokens.shape[1] + 1), np.int32)
    for i, n in enumerate(prompts.lengths):
        batch[i, : had[i]] = pending[i]
        batch[i, had[i] : had[i] + n] = prompts.tokens[i, :n]
    joined = Prompts(batch, prompts.lengths + had, prompts.rests)
    return joined, chunk_size(int(joined.lengths.max()), prefill_chunk, cache.policy.queries)
