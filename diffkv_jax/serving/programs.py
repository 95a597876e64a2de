"""The compiled programs of the engine. Each takes the pool and the rows it works on, and gives them
back; rows that it is not given are untouched.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.admission import held_pages, released
from diffkv_jax.cache.cache import KVCache, with_counters, without_empty
from diffkv_jax.decode_loop import RESTING, RUNNING, State, take_tokens
from diffkv_jax.model import CausalLM
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.serving.asked import Asked
from diffkv_jax.serving.logprobs import Logprobs, noted, room
from diffkv_jax.serving.penalties import changed
from diffkv_jax.serving.rows import Pool, Rows, completed, joined, one_by_one, taken_apart, together
from diffkv_jax.steps.decode_event import compress
from diffkv_jax.steps.jitted import decode_step, end_passes, feed_chunk, score_pass

WIDTH = 32  # most steps of one call of `decode`
STALLED = 6  # a reason beside those of `decode_loop`: its event waits for pages


class Standing(NamedTuple):
    """Where the pool and R rows stand, for the host."""

    free: Array  # int32 [] pages
    pages: Array  # int32 [R] that each row holds
    overflow: Array  # bool [R]


class Turn(NamedTuple):
    """What came of some steps of R rows, for the host."""

    tokens: State
    logprobs: Logprobs
    standing: Standing


@partial(jax.jit, static_argnames="model", donate_argnames=("pool", "rows"))
@in_32_bits
def read(
    model: CausalLM,
    params,
    fixed: KVCache,
    pool: Pool,
    rows: tuple[Rows, ...],
    tokens: Array,
    length: Array,
    decides: Array,
) -> tuple[tuple[Array, ...], Standing, Pool, tuple[Rows, ...]]:
    """Feed a right-aligned chunk `tokens` int32 [n, C], `length` int32 [n] of them real, to n
    single rows; with `decides` (bool []) the policy runs. Logits float32 [1, vocab] of each.
    """
    cache = together(fixed, pool, joined(rows))
    logits, cache = feed_chunk(model, params, cache, tokens, length, decides)
    pool, after = taken_apart(cache)
    each = tuple(logits[i : i + 1] for i in range(len(rows)))
    return each, _standing(cache), pool, one_by_one(after)


@partial(jax.jit, static_argnames="model", donate_argnames=("pool", "rows"))
@in_32_bits
def read_again(
    model: CausalLM,
    params,
    fixed: KVCache,
    pool: Pool,
    rows: Rows,
    tokens: Array,
    length: Array,
    first: Array,
) -> tuple[Pool, Rows]:
    """One of the passes that a score goes over a prompt with (`steps.jitted.score_pass`)."""
    cache = score_pass(model, params, together(fixed, pool, rows), tokens, length, first)
    return taken_apart(cache)


@partial(jax.jit, donate_argnames=("pool", "rows"))
@in_32_bits
def end_reading_again(fixed: KVCache, pool: Pool, rows: Rows) -> tuple[Standing, Pool, Rows]:
    """The event after those passes."""
    cache = end_passes(together(fixed, pool, rows), jnp.ones(1, bool))
    return _standing(cache), *taken_apart(cache)


@partial(jax.jit, donate_argnames="rows")
@in_32_bits
def first_token(logits: Array, rows: Rows, asked: Asked) -> tuple[State, Logprobs, Rows]:
    """The first token of one row, of `logits` float32 [1, vocab]."""
    zero = jnp.zeros(1, jnp.int32)
    state = State(zero[:, None], zero, zero)
    logits = changed(asked.penalties, logits, state)
    state, counters = take_tokens(state, rows.counters, logits, zero == 0, asked.requests)
    logprobs = noted(
        room(1, logits.shape[1], 1), logits, counters.pending, jnp.int32(0), asked.told
    )
    return state, logprobs, rows._replace(counters=counters)


@partial(jax.jit, static_argnames=("model", "width"), donate_argnames=("pool", "rows"))
@in_32_bits
def decode(
    model: CausalLM,
    params,
    fixed: KVCache,
    pool: Pool,
    rows: Rows,
    running: Array,
    asked: Asked,
    steps: Array,
    until_end: Array,
    width: int,
) -> tuple[Turn, Pool, Rows]:
    """Up to `steps` int32 [] (at most `width`) steps of the rows that are `running` bool [R]; with
    `until_end` (bool []) no more once one of them ends. `Requests.limit` int32 [R] counts from
    here. A row whose event finds no pages is `STALLED`: it keeps the token that it has drawn, and
    goes on after `retry`.
    """
    count = len(running)
    zeros = jnp.zeros(count, jnp.int32)
    reason = jnp.where(running, RUNNING, RESTING).astype(jnp.int32)
    start = State(jnp.zeros((count, width), jnp.int32), zeros, reason)

    def turn(carry: tuple) -> tuple:
        state, logprobs, cache, done = carry
        active = state.reason == RUNNING
        pending = jnp.maximum(cache.counters.pending, 0)
        logits, cache = decode_step(model, params, cache, pending, active)
        logits = changed(asked.penalties, logits, state)
        state, counters = take_tokens(state, cache.counters, logits, active, asked.requests)
        waits = active & counters.overflow & (state.reason == RUNNING)
        state = state._replace(reason=jnp.where(waits, STALLED, state.reason))
        logprobs = noted(logprobs, logits, counters.pending, done, asked.told)
        return state, logprobs, with_counters(cache, pending=counters.pending), done + 1

    def goes_on(carry: tuple) -> Array:
        state, _, _, done = carry
        ended = (state.reason != reason).any()
        return (state.reason == RUNNING).any() & (done < steps) & ~(until_end & ended)

    carry = (
        start,
        room(count, model.attention.vocab_size, width),
        together(fixed, pool, rows),
        jnp.int32(0),
    )
    state, logprobs, cache, _ = lax.while_loop(goes_on, turn, carry)
    return Turn(state, logprobs, _standing(cache)), *taken_apart(cache)


@partial(jax.jit, donate_argnames=("pool", "rows"))
@in_32_bits
def retry(fixed: KVCache, pool: Pool, rows: Rows, due: Array) -> tuple[Standing, Pool, Rows]:
    """The event that the rows `due` bool [R] had no pages for, now."""
    cache = completed(fixed, pool, rows)
    cache = with_counters(cache, overflow=cache.counters.overflow & ~due)
    if cache.spec.paged_layers:
        cache = compress(cache, due)
    cache = without_empty(cache)
    return _standing(cache), *taken_apart(cache)


@partial(jax.jit, donate_argnames=("pool", "rows"))
@in_32_bits
def release(fixed: KVCache, pool: Pool, rows: Rows, gone: Array) -> tuple[Standing, Pool, Rows]:
    """Free all pages of the rows `gone` bool [R]."""
    cache = released(completed(fixed, pool, rows), gone)
    now = cache.counters
    none = {name: jnp.where(gone, 0, getattr(now, name)) for name in ("seq_len", "recent_len")}
    cache = without_empty(with_counters(cache, overflow=now.overflow & ~gone, **none))
    return _standing(cache), *taken_apart(cache)


def _standing(cache: KVCache) -> Standing:
    return Standing(cache.stored.ring.count, held_pages(cache), cache.counters.overflow)
