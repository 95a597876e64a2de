"""`generate`: prompts in, tokens and the compressed cache out."""

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.budget import check_pool, kept_within, with_pool
from diffkv_jax.cache import CacheSpec, KVCache, empty_cache, kernels_for
from diffkv_jax.calibration import Calibration, tables_for
from diffkv_jax.model_protocol import AttentionSpec, CausalLM
from diffkv_jax.pallas_kernels.kernels import Kernels
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.policy import CompressionPolicy
from diffkv_jax.prompt import as_batch, check_context, check_evicts_once, chunk_size, chunks, replay_passes
from diffkv_jax.runner import decode_step, end_replay, prefill_chunk, replay_chunk
from diffkv_jax.sampling import Greedy, Sample, next_token

RUNNING, EOS, LENGTH, CACHE_FULL = range(4)
FINISH_REASONS = ("running", "eos", "length", "cache_full")


@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns.

    Attributes:
        tokens: int32 [R, max_new_tokens], generated ids, a stop id included; zeros behind `lengths`.
        lengths: int32 [R], how many were generated.
        finish_reason: per request "eos", "length" or "cache_full" (the pool had no page left for it; with `lengths` 0 its prompt did not
            fit, and the cache holds nothing of it any more, earlier turns included).
        cache: the compressed cache; give it to the next call to go on. It is donated there.
        prefill_seconds: wall time until the prompts were in the cache, compilation included.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    finish_reason: tuple[str, ...]
    cache: KVCache
    prefill_seconds: float


@in_32_bits
def generate(
    model: CausalLM,
    params,
    tokens,
    lengths: Sequence[int] | np.ndarray | None = None,
    *,
    policy: CompressionPolicy | None = None,
    memory_budget: int | str | None = None,
    max_new_tokens: int = 128,
    sampling: Greedy | Sample | None = None,
    key: Array | None = None,
    stop_token_ids: Sequence[int] = (),
    cache: KVCache | None = None,
    max_len: int | None = None,
    cache_dtype: str | None = None,
    prefill_chunk: int = 1024,
    implementation: str | None = None,
    interpret: bool = False,
    calibration: Calibration | None = None,
) -> GenerateOutput:
    """Continue prompts with a compressed KV cache.

    A batch row gives the same tokens as the same request alone; with `Sample`, when it has the same key; under a budget, unless the pool
    runs low: then the batch's prompts are compressed earlier.

    Args:
        model: satisfies `CausalLM`; static, so reuse the object.
        params: its parameters.
        tokens: int [R, N] right-padded with `lengths` int [R], or a ragged list of lists.
        policy: how to compress; `CompressionPolicy.none()` when None. Fixed by the first call when `cache` is given.
        memory_budget: bytes or text such as "512MiB" for the whole cache; None reserves for every token in the highest tier.
        max_new_tokens: most tokens to generate.
        sampling: `Greedy()` (default) or `Sample(...)`.
        key: a random key (request i draws with `fold_in(key, i)`) or one key a request `[R]`; needed by `Sample`.
        stop_token_ids: a request ends with "eos" when it generates one of them.
        cache: from an earlier call: the prompts go on where it ended. Donated.
        max_len: most tokens that a request may ever come to in this cache; what this call needs when None.
        cache_dtype: dtype of exact tokens ("full" tier, recent window); the model's when None.
        prefill_chunk: prompts go in chunks of this many tokens, a power of two; a prompt that fits one is attended exactly.
        implementation: kernels: "xla", "cpu" (native), "triton" (GPU) or "mosaic_tpu" (TPU); None takes those of the platform at hand.
        interpret: run Pallas kernels in their interpreter, on any platform: slow, for tests.
        calibration: what `calibrate` made for this model and policy; needed where codecs are learned.

    Raises:
        ValueError: bad input, named, before anything is computed.
    """
    attention = model.attention
    batch, sizes = as_batch(tokens, lengths, attention.vocab_size)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if cache is not None:
        _check_unset(policy=policy, memory_budget=memory_budget, max_len=max_len, cache_dtype=cache_dtype)
        _check_unset(implementation=implementation, interpret=interpret or None, calibration=calibration)
        batch, sizes = _continued(cache, attention, batch, sizes)
    seen = np.zeros_like(sizes) if cache is None else np.asarray(cache.seq_len)
    totals = seen + sizes + max_new_tokens - 1
    limit = cache.spec.max_len if cache is not None else int(totals.max()) if max_len is None else max_len
    check_context(attention, totals, limit)
    if cache is not None:
        check_pool(cache, [int(n) for n in totals])
    keys, stops = _request_keys(sampling, key, len(sizes)), _padded(stop_token_ids)
    if cache is None:
        policy = policy or CompressionPolicy.none()
        kernels = kernels_for(policy, attention, implementation, interpret=interpret)
        if calibration is not None:
            calibration.check(model, params)
        cache = make_cache(
            model,
            policy,
            totals,
            max_len=max_len,
            memory_budget=memory_budget,
            cache_dtype=cache_dtype,
            kernels=kernels,
            calibration=calibration,
        )
    observe = cache.spec.selection.observe if isinstance(cache.spec.selection.observe, int) else 0
    size = chunk_size(int(sizes.max()), prefill_chunk, observe)
    began = time.perf_counter()
    logits, cache = jax.block_until_ready(prefill(model, params, cache, batch, sizes, size))
    prefill_seconds = time.perf_counter() - began
    width = 1 << (max_new_tokens - 1).bit_length()
    state = _decode(model, params, cache, logits, keys, jnp.int32(max_new_tokens), stops, sampling or Greedy(), width)
    out, counts, reasons = jax.device_get((state.tokens, state.lengths, state.reason))
    return GenerateOutput(out[:, :max_new_tokens], counts, tuple(FINISH_REASONS[r] for r in reasons), state.cache, prefill_seconds)


@in_32_bits
def make_cache(
    model: CausalLM,
    policy: CompressionPolicy,
    totals: Sequence[int] | np.ndarray,
    *,
    max_len: int | None = None,
    memory_budget: int | str | None = None,
    cache_dtype: str | None = None,
    kernels: Kernels | None = None,
    calibration: Calibration | None = None,
) -> KVCache:
    """An empty cache for requests that come to `totals` tokens each; `kernels` are those of the platform when None, the other arguments
    are those of `generate`.

    A calibration must be of the policy's tiers and transforms; that it is of these parameters only `generate` can check.
    Without `max_len` the totals are rounded up to multiples of 128, so that nearly equal prompts share their compiled programs.
    """
    attention = model.attention
    totals = [int(n) for n in totals]
    room = [-(-n // 128) * 128 if max_len is None else max_len for n in totals]
    spec = CacheSpec.build(
        attention,
        policy,
        num_requests=len(totals),
        max_len=max(room),
        num_pages=0,
        dtype=cache_dtype or attention.dtype,
        kernels=kernels or kernels_for(policy, attention),
    )
    tables = tables_for(spec, policy, calibration)
    if isinstance(policy.keep, str):
        _check_one_budget(policy, memory_budget)
        policy, memory_budget = kept_within(spec, policy, room), policy.keep
    spec = with_pool(spec, policy, totals, room, memory_budget)
    return _empty(spec, policy.limits(len(spec.paged_layers), spec.num_requests, attention.num_kv_heads), tables)


def _check_one_budget(policy: CompressionPolicy, memory_budget: int | str | None) -> None:
    if memory_budget is not None:
        raise ValueError(f"keep={policy.keep!r} is a memory budget already: leave memory_budget={memory_budget!r} out")


_empty = jax.jit(empty_cache, static_argnames="spec")


@in_32_bits
def prefill(model: CausalLM, params, cache: KVCache, tokens: np.ndarray, lengths: np.ndarray, size: int) -> tuple[Array, KVCache]:
    """Feed prompts `[R, N]` in chunks of `size`; logits [R, vocab] of each prompt's last token and the cache (donated).

    A policy that ranks by replay has the first prompt of a request gone over again and then drops; later prompts stay as they are.

    Raises:
        ValueError: the policy drops tokens before they are encoded, and the prompt takes more than one chunk or is not the first; or going
            over a prompt again would outgrow the model's context or vocabulary.
    """
    seen, replay = np.asarray(cache.seq_len), cache.spec.selection.replay if cache.spec.paged_layers else None
    check_evicts_once(cache.spec, seen, lengths, size)
    again = np.where(seen == 0, lengths, 0)
    if replay is not None:
        replay.check(cache.spec.attention, again)
    logits = None
    cache = dataclasses.replace(cache, overflow=jnp.zeros_like(cache.overflow))
    for part, real, last in chunks(tokens, lengths, size):
        logits, cache = prefill_chunk(model, params, cache, jnp.asarray(part), jnp.asarray(real), jnp.asarray(last))
    if replay is not None and again.any():
        for part, real, first in replay_passes(replay, tokens, again):
            cache = replay_chunk(model, params, cache, jnp.asarray(part), jnp.asarray(real), jnp.int32(first))
        cache = end_replay(cache, jnp.asarray(again > 0))
    assert logits is not None  # as_batch refuses empty prompts
    return logits, cache


class _State(NamedTuple):
    """The decode loop's carry; R requests."""

    cache: KVCache
    token: Array  # int32 [R] last sampled, not yet seen by the model
    tokens: Array  # int32 [R, width]
    lengths: Array  # int32 [R]
    reason: Array  # int32 [R] RUNNING until the request has ended


@partial(jax.jit, static_argnames=("model", "sampling", "width"), donate_argnames="cache")
def _decode(model, params, cache, logits, keys, limit, stops, sampling, width) -> _State:
    """Sample, feed, sample ... until every request has ended. No host read."""
    requests = logits.shape[0]
    start = _State(
        cache,
        jnp.zeros(requests, jnp.int32),
        jnp.zeros((requests, width), jnp.int32),
        jnp.zeros(requests, jnp.int32),
        jnp.where(cache.overflow, CACHE_FULL, RUNNING),
    )

    def take(state: _State, logits: Array) -> _State:
        """Sample one token for every running request and see whether it ends there."""
        running = state.reason == RUNNING
        drawn = next_token(sampling, logits, jax.vmap(jax.random.fold_in)(keys, state.lengths))
        token = jnp.where(running, drawn, state.token)
        column = jnp.where(running, state.lengths, width)
        lengths = state.lengths + running
        ended = jnp.where((token[:, None] == stops).any(axis=1), EOS, jnp.where(lengths >= limit, LENGTH, RUNNING))
        return _State(
            state.cache,
            token,
            state.tokens.at[jnp.arange(requests), column].set(token, mode="drop"),
            lengths,
            jnp.where(running, ended, state.reason),
        )

    def step(state: _State) -> _State:
        running = state.reason == RUNNING
        logits, cache = decode_step(model, params, state.cache, state.token, running)
        reason = jnp.where(running & cache.overflow, CACHE_FULL, state.reason)
        return take(state._replace(cache=cache, reason=reason), logits)

    state = lax.while_loop(lambda state: jnp.any(state.reason == RUNNING), step, take(start, logits))
    unseen = (state.lengths > 0) & (state.reason != CACHE_FULL)  # the model had seen the last token when the cache was found full
    pending = jnp.where(unseen, state.token, -1)
    return state._replace(cache=dataclasses.replace(state.cache, pending=pending))


def _padded(stop_token_ids: Sequence[int]) -> Array:
    """Stop ids int32, filled with -1 to a power of two of at least 8, so that another number of them compiles nothing."""
    stops = list(stop_token_ids)
    if not all(isinstance(i, int | np.integer) for i in stops):
        raise ValueError(f"stop_token_ids={stops} must be integers; leave out what the tokenizer does not have")
    width = max(8, 1 << max(len(stops) - 1, 0).bit_length())
    return jnp.asarray([*stops, *[-1] * (width - len(stops))], jnp.int32)


def _check_unset(**arguments) -> None:
    """Refuse arguments that a given cache has fixed."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} were fixed by the call that made the cache; leave them out when cache= is given")


def _continued(cache: KVCache, attention: AttentionSpec, batch: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Prompts that go on from `cache`, each with the token that was sampled last (the model has not seen it) put before it."""
    if cache.spec.attention != attention:
        raise ValueError(f"the cache was made for another model: {cache.spec.attention}, given {attention}; use the model that made it")
    if len(sizes) != cache.spec.num_requests:
        raise ValueError(f"the cache holds {cache.spec.num_requests} requests, given {len(sizes)} prompts; they must match row by row")
    if any(x.is_deleted() for x in jax.tree.leaves(cache)):
        raise ValueError("this cache was given to an earlier call, which took its memory; use the cache that call returned")
    pending = np.asarray(cache.pending)
    had = (pending >= 0).astype(np.int32)
    joined = np.zeros((batch.shape[0], batch.shape[1] + 1), np.int32)
    for i, n in enumerate(sizes):
        joined[i, : had[i]] = pending[i]
        joined[i, had[i] : had[i] + n] = batch[i, :n]
    return joined, sizes + had


def _request_keys(sampling: Greedy | Sample | None, key: Array | None, requests: int) -> Array:
    """One random key a request."""
    if key is None:
        if isinstance(sampling, Sample):
            raise ValueError("sampling=Sample(...) needs key=, such as jax.random.key(0)")
        key = jax.random.key(0)
    if key.ndim == 1 and key.shape[0] == requests and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if key.ndim != 0 or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"key must be jax.random.key(seed) or one such key for each of the {requests} requests, given {key.dtype} {key.shape}"
        )
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(requests))
