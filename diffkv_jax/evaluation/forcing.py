"""`teacher_forced`: what a model predicts while a text is fed to it through a compressing cache."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from tqdm import tqdm

from diffkv_jax.arguments import flag, integer, text
from diffkv_jax.batching import as_batch, chunk_size
from diffkv_jax.cache.cache import KVCache
from diffkv_jax.calibration.calibration import Calibration
from diffkv_jax.choice.automatic import AutoPolicy, asks_for_fit, chosen
from diffkv_jax.choice.fitted import FittedPolicy
from diffkv_jax.inputs import as_params, check_model, check_outside_jit
from diffkv_jax.make_cache import check_before_fit, make_cache
from diffkv_jax.model import CausalLM
from diffkv_jax.not_finite import warn_of_errors
from diffkv_jax.pallas_kernels.branch import when
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.linear import sum_of_rows
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.read_prompts import prefill
from diffkv_jax.steps.jitted import decode_step

SEGMENT = 16  # decode steps a compiled call: how often progress is shown and logits fetched


@in_32_bits
def teacher_forced(
    model: CausalLM,
    params: Any,
    tokens: Any,
    context: int,
    policy: CompressionPolicy | FittedPolicy | AutoPolicy | str | None,
    *,
    memory_budget: int | str | None = None,
    max_len: int | None = None,
    cache_dtype: str | None = None,
    prefill_chunk: int = 1024,
    progress: str | None = None,
    calibration: Calibration | None = None,
    first: bool = False,
) -> tuple[np.ndarray, KVCache]:
    """Prefill `tokens[:, :context]` int [R, N], then feed the others one by one, compressing.

    Returns log-probabilities float32 [R, N - context, vocab], row i after seeing `context + i + 1`
    tokens, and the cache at the end. `first` puts the row after the `context` tokens alone before
    them: [R, N - context + 1, vocab]. `progress` names a progress bar; None shows none. The other
    arguments are those of `generate`.

    A warning says where the numbers of a request stopped being finite.

    Raises:
        TypeError, ValueError: bad input, a context that leaves nothing to feed, or (at the end) a
            pool that was too small for some request.
    """
    check_model("teacher_forced", model)
    params = as_params("teacher_forced", params)
    check_outside_jit("teacher_forced", tokens)
    batch, sizes, context = _checked(model, tokens, context)
    first = flag("first", first)
    if progress is not None:
        progress = text("progress", progress, "the name of a progress bar, or None")
    chunk = integer("prefill_chunk", prefill_chunk)
    given: dict[str, Any] = {"max_len": max_len, "memory_budget": memory_budget}
    given["cache_dtype"] = cache_dtype
    if asks_for_fit(policy):
        check_before_fit(model, sizes, context, chunk, **given)
    room: Any = {"context": max_len or batch.shape[1], "requests": len(batch)}
    room["memory_budget"] = memory_budget
    policy, calibration, _ = chosen(model, params, policy, calibration, **room)
    size = chunk_size(context, chunk, policy.queries)
    cache = make_cache(model, policy, sizes, **given, calibration=calibration)
    logits, cache = prefill(model, params, cache, batch, np.full_like(sizes, context), size)
    begin = np.asarray(_log_softmax(logits.astype(jnp.float32), cache.spec.kernels))[:, None]
    log_probs, cache = feed(model, params, cache, batch[:, context:], progress)
    log_probs = np.concatenate([begin, log_probs], axis=1) if first else log_probs
    full = np.flatnonzero(np.asarray(cache.counters.overflow))
    if full.size:
        raise ValueError(
            f"the pool had no page left for requests {full.tolist()}: raise "
            f"memory_budget={memory_budget!r} or drop more"
        )
    failed = [i for i, row in enumerate(log_probs) if np.isnan(row).any()]
    warn_of_errors(cache, failed, stacklevel=4)  # in_32_bits, teacher_forced
    return log_probs, cache


def _checked(model: CausalLM, tokens: Any, context: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Texts int32 [R, N] of one length, that length for each, and the context."""
    batch, sizes = as_batch(tokens, model.attention.vocab_size)
    if (sizes != batch.shape[1]).any():
        raise ValueError(
            f"tokens must be texts of one length, given lengths {sizes.tolist()}: cut them to the "
            "shortest"
        )
    context = integer("context", context, least=1)
    if context >= batch.shape[1]:
        raise ValueError(
            f"context={context} must leave something of the {batch.shape[1]} tokens to feed"
        )
    return batch, sizes, context


def feed(
    model: CausalLM, params: Any, cache: KVCache, tokens: np.ndarray, progress: str | None = None
) -> tuple[np.ndarray, KVCache]:
    """Feed `tokens` int32 [R, S]; log-probabilities float32 [R, S, vocab]."""
    held = tokens.T
    rows = []
    starts, hidden = range(0, len(held), SEGMENT), progress is None
    for first in tqdm(starts, desc=progress, disable=hidden, unit_scale=SEGMENT, unit=" tokens"):
        part = np.zeros((SEGMENT, held.shape[1]), np.int32)
        real = held[first : first + SEGMENT]
        part[: len(real)] = real
        fed = jnp.arange(SEGMENT) < len(real)
        log_probs, cache = _feed(model, params, cache, jnp.asarray(part), fed)
        rows.append(np.asarray(log_probs[: len(real)]))
    return np.concatenate(rows).swapaxes(0, 1), cache


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _feed(
    model: CausalLM, params, cache: KVCache, tokens: Array, real: Array
) -> tuple[Array, KVCache]:
    """Feed `tokens` int32 [S, R], steps that are not `real` bool [S] changing nothing;
    log-probabilities [S, R, vocab].
    """

    def step(cache, inputs):
        token, live = inputs

        def feed(fed):
            _, cache = fed
            active = jnp.full(token.shape, True) & ~cache.counters.overflow
            logits, cache = decode_step(model, params, cache, token, active)
            return _log_softmax(logits, cache.spec.kernels), cache

        nothing = jnp.zeros((*token.shape, model.attention.vocab_size), jnp.float32)
        log_probs, cache = when(live, feed, (nothing, cache))
        return cache, log_probs

    cache, log_probs = lax.scan(step, cache, (tokens, real))
    return log_probs, cache


def _log_softmax(logits: Array, kernels: Kernels) -> Array:
    """Log-probabilities of `logits [R, vocab]`; with native kernels the same in any batch."""
    relative = logits - logits.max(axis=-1, keepdims=True)
    return relative - jnp.log(sum_of_rows(jnp.exp(relative), kernels=kernels))
