"""The decode loop on the device: sample, feed, sample ..., back in Python a few times a second."""

import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.cache.cache import Counters, KVCache, with_counters
from diffkv_jax.interrupt import Held
from diffkv_jax.model import CausalLM
from diffkv_jax.sampling import Rules, next_token
from diffkv_jax.steps.jitted import decode_step

RUNNING, EOS, LENGTH, CACHE_FULL, ERROR, RESTING = range(6)
FINISH_REASONS = ("interrupted", "eos", "length", "cache_full", "error", "resting")
SECONDS = 0.25  # about how long the loop runs on the device before Python looks whether to go on


class Requests(NamedTuple):
    """What stays the same for R requests during a call."""

    rules: Rules
    keys: Array  # a random key a request [R]
    limit: Array  # int32 [] or [R] most tokens to generate
    stops: Array  # int32 [n] or [R, n] ids that end a request, -1 for none


class State(NamedTuple):
    """What changes beside the cache."""

    tokens: Array  # int32 [R, width]
    lengths: Array  # int32 [R]
    reason: Array  # int32 [R] RUNNING until the request has ended


def decode(model: CausalLM, params, held: Held, requests: Requests) -> None:
    """Run until every request of `held.value`, a `State`, has ended."""

    def turns(state: State, cache: KVCache, steps: Array) -> tuple[State, KVCache]:
        return advance(model, params, cache, state, requests, steps)

    steps = 1
    with held.bar(desc="generating", unit=" tokens a request") as bar:
        while (np.asarray(held.value.reason) == RUNNING).any():  # else nothing is compiled
            began = time.perf_counter()
            held.update(turns, jnp.int32(steps))
            jax.block_until_ready(held.value)
            # of the first call with the time to compile: then one step more
            pace = (time.perf_counter() - began) / steps
            bar.update(steps)
            steps = max(1, min(8 * steps, int(SECONDS / pace)))


@partial(jax.jit, static_argnames="width", donate_argnames="cache")
def begin(
    cache: KVCache, logits: Array | None, fresh: Array, rests: Array, requests: Requests, width: int
) -> tuple[State, KVCache]:
    """The state before the first step, room for `width` tokens. Requests that are `fresh` (bool
    [R]) take their first token from `logits` [R, vocab], those that rest (bool [R]) do nothing, the
    others go on with their pending token.
    """
    count = len(fresh)
    full = cache.counters.overflow & ~rests
    waiting = jnp.where(fresh | (requests.limit > 0), RUNNING, LENGTH)
    reason = jnp.where(rests, RESTING, jnp.where(full, CACHE_FULL, waiting)).astype(jnp.int32)
    state = State(jnp.zeros((count, width), jnp.int32), jnp.zeros(count, jnp.int32), reason)
    if logits is None:
        return state, cache
    state, counters = take_tokens(state, cache.counters, logits, fresh, requests)
    return state, replace(cache, counters=counters)


@partial(jax.jit, static_argnames="model", donate_argnames=("cache", "state"))
def advance(
    model: CausalLM, params, cache: KVCache, state: State, requests: Requests, steps: Array
) -> tuple[State, KVCache]:
    """Up to `steps` int32 [] turns of feeding and sampling. No host read."""

    def turn(carry: tuple[State, KVCache, Array]) -> tuple[State, KVCache, Array]:
        state, cache, left = carry
        running = state.reason == RUNNING
        logits, cache = decode_step(
            model, params, cache, jnp.maximum(cache.counters.pending, 0), running
        )
        full = running & cache.counters.overflow
        cache = with_counters(cache, pending=jnp.where(full, -1, cache.counters.pending))
        state = state._replace(reason=jnp.where(full, CACHE_FULL, state.reason))
        asked = running & ~full
        state, counters = take_tokens(state, cache.counters, logits, asked, requests)
        return state, replace(cache, counters=counters), left - 1

    def goes_on(carry: tuple[State, KVCache, Array]) -> Array:
        return jnp.any(carry[0].reason == RUNNING) & (carry[2] > 0)

    return lax.while_loop(goes_on, turn, (state, cache, steps))[:2]


def take_tokens(
    state: State, counters: Counters, logits: Array, asked: Array, requests: Requests
) -> tuple[State, Counters]:
    """One token for every running request that is `asked` (bool [R]), and whether it ends there.

    The draw depends on the request's key and the token's position alone, so that turns draw as one
    call.
    """
    asked &= state.reason == RUNNING
    broken = asked & ~jnp.isfinite(logits.max(axis=-1))  # NaN, infinity, or nothing to choose
    draws = asked & ~broken & (state.lengths < requests.limit)
    keys = jax.vmap(jax.random.fold_in)(requests.keys, counters.seq_len)
    drawn = next_token(requests.rules, logits, keys)
    rows, width = jnp.arange(len(asked)), state.tokens.shape[1]
    lengths = state.lengths + draws
    ended = jnp.where(lengths >= requests.limit, LENGTH, RUNNING)
    ended = jnp.where(draws & (drawn[:, None] == requests.stops).any(axis=1), EOS, ended)
    reason = jnp.where(broken, ERROR, jnp.where(asked, ended, state.reason))
    pending = jnp.where(draws, drawn, jnp.where(asked, -1, counters.pending))
    column = jnp.where(draws, state.lengths, width)
    tokens = state.tokens.at[rows, column].set(drawn, mode="drop")
    return State(tokens, lengths, reason), counters._replace(pending=pending)
