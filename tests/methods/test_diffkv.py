"""Who is in which tier after every step of the whole cache, against the slow model of Algorithm 1
(docs/design.md 1).

The model's q, k and v are tables, so a dense evaluation of what the cache holds (read back from its
pages by NumPy) gives the probabilities that the cache must have computed; the slow model decides
from those.
"""

import dataclasses
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table_model import (
    CHUNK,
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    MAX_LEN,
    MODEL,
    OBSERVE,
    REQUESTS,
    SPEC,
    STEPS,
    WINDOW,
    tables,
)

from diffkv_jax import CausalLM, diffkv, make_cache
from diffkv_jax.batching import chunks
from diffkv_jax.policy.stage import with_leaves
from diffkv_jax.steps.jitted import decode_step, prefill_chunk
from diffkv_jax.testing.readback import check_pool, held_tokens
from oracles.algorithm1 import Head

# relative distance below which float32 sums and float64 probabilities may decide differently
NEAR = 1e-5
LENGTHS = [(5, 32, 20), (1, 70, 33), (9, 8, 64)]


# --- the slow model ---


class Watched(Head):
    """A `Head` that refuses near ties, where rounding may decide, and counts which branches of
    Algorithm 1 it took.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.branches, self.near = Counter(), 0  # branches taken in decode, near ties met

    def wanted(self, token):
        for alpha in (self.alpha_high, self.alpha_low):
            tau = alpha / self.seen
            self.near += int(abs(self.mean(token) - tau) < NEAR * tau)
        return super().wanted(token)

    def least_significant(self, tokens):
        least, *others = sorted(map(self.mean, tokens))
        victim = super().least_significant(tokens)
        self.near += int(
            bool(others)
            and others[0] - least < NEAR * others[0]
            and super().wanted(victim) != "high"
        )
        return victim

    def step(self, probabilities):
        first = len(self.log)
        tiers = super().step(probabilities)
        self.branches.update(f"{before} to {after}" for _, _, before, after in self.log[first:])
        return tiers


BRANCHES = {
    "recent to high",
    "recent to low",
    "recent to dropped",
    "high to low",
    "high to dropped",
    "low to dropped",
}


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


class Run:
    """A cache and one slow model a head, side by side."""

    def __init__(self, flush: int, kind: str, seed: int, cache_dtype: str = "float32"):
        self.tables, self.flush = tables(kind, seed), flush
        rng = np.random.default_rng(seed)
        high = rng.choice([0.5, 1.0, 1.6], (LAYERS, REQUESTS, KV_HEADS))
        self.alpha = np.stack(
            [high, high * rng.choice([0.0, 0.15, 0.5, 1.0], high.shape, p=[0.1, 0.35, 0.35, 0.2])],
            axis=-1,
        ).astype(np.float32)
        policy = diffkv(2.0, 0.1, queries=OBSERVE, window=WINDOW, flush=flush)
        cache = make_cache(MODEL, policy, [MAX_LEN] * REQUESTS, cache_dtype=cache_dtype)
        high, low = (jnp.asarray(self.alpha[..., i]) for i in range(2))
        keep = with_leaves(cache.policy.keep, alpha_high=high, alpha_low=low)
        policy = with_leaves(cache.policy, keep=keep)
        self.cache = dataclasses.replace(cache, policy=policy)
        self.heads = {
            at: Watched(*self.alpha[at], window=WINDOW, flush=flush, observe=OBSERVE)
            for at in np.ndindex(LAYERS, REQUESTS, KV_HEADS)
        }
        self.read()

    def exact(
        self, at: tuple[int, int, int], first: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Queries float64 [GROUP, count, d] and rounded keys [count, d] of new positions of a
        head.
        """
        layer, request, head = at
        rows = slice(first, first + count)
        q = (
            self.tables.q[layer, request, rows, head * GROUP : (head + 1) * GROUP]
            .swapaxes(0, 1)
            .astype(np.float64)
        )
        return q, self.tables.k[layer, request, rows, head].astype(
            jnp.dtype(self.cache.spec.dtype)
        ).astype(np.float64)

    def read(self) -> None:
        """Read back what the heads hold."""
        self.host = jax.device_get(self.cache)
        self.held = {at: held_tokens(self.host, *at) for at in self.heads}

    def keys(self, at: tuple[int, int, int]) -> np.ndarray:
        """Keys float64 [n, d] of all that a head holds."""
        return np.array([token[1] for token in self.held[at].values()], np.float64).reshape(
            -1, HEAD_DIM
        )

    def prefill(self, lengths: tuple[int, ...]) -> None:
        """Feed the prompts; the slow models get the column sums of the last chunk over what was
        held before it and the chunk itself.
        """
        sums = {}
        for _, real, last in chunks(
            np.zeros((REQUESTS, max(lengths)), np.int32), np.array(lengths), CHUNK
        ):
            self.read()
            for at in self.heads if last else ():
                n, old = int(real[at[1]]), self.keys(at)
                q, own = self.exact(at, lengths[at[1]] - n, n)
                logits = q @ np.concatenate([old, own]).T * SPEC.sm_scale
                logits[:, np.arange(logits.shape[2]) > len(old) + np.arange(n)[:, None]] = -np.inf
                column = softmax(logits)[:, max(n - OBSERVE, 0) :].sum(axis=1).max(axis=0)
                sums[at] = dict(
                    zip(
                        [*self.held[at], *range(lengths[at[1]] - n, lengths[at[1]])],
                        column,
                        strict=True,
                    )
                )
            tokens = jnp.zeros((REQUESTS, CHUNK), jnp.int32)
            _, self.cache = prefill_chunk(
                MODEL, self.tables, self.cache, tokens, jnp.asarray(real), jnp.asarray(last)
            )
        for at, head in self.heads.items():
            head.prefill(sums[at], lengths[at[1]])
        self.check()

    def step(self, active=(True,) * REQUESTS) -> None:
        """One token for each active request, through the cache and through the slow models."""
        for at, head in self.heads.items():
            if not active[at[1]]:
                continue
            old = self.keys(at)
            q, own = self.exact(at, head.seen, 1)
            p = softmax(q[:, 0] @ np.concatenate([old, own]).T * SPEC.sm_scale).max(axis=0)
            head.step(dict(zip([*self.held[at], head.seen], p, strict=True)))
        _, self.cache = compiled_step(
            self.tables, self.cache, jnp.zeros(REQUESTS, jnp.int32), jnp.asarray(active)
        )
        self.check()

    def check(self) -> None:
        """Tiers, positions and sums of significance are those of the slow models, and the pages add
        up.
        """
        self.read()
        host = self.host
        assert not host.counters.overflow.any()
        check_pool(host.spec.layout, host.stored.page_table, host.stored.tier_len, host.stored.ring)
        for at, head in self.heads.items():
            held = self.held[at]
            wanted = {position: tier for position, tier in head.tiers.items() if tier != "dropped"}
            assert {position: token[0] for position, token in held.items()} == wanted, (
                f"{at}, {head.seen} tokens"
            )
            sums = {
                token.position: token.significance for token in head.recent + head.high + head.low
            }
            np.testing.assert_allclose(
                [token[3] for token in held.values()],
                [sums[position] for position in held],
                rtol=2 * NEAR,
            )

    def near_ties(self) -> int:
        return sum(head.near for head in self.heads.values())

    def taken(self) -> Counter:
        """How often each branch was taken in decode."""
        return sum((head.branches for head in self.heads.values()), Counter())


compiled_step = jax.jit(partial(decode_step, MODEL), donate_argnums=1)


def play(flush: int, kind: str, seed: int, lengths: tuple[int, ...], steps: int, **options) -> Run:
    run = Run(flush, kind, seed, **options)
    run.prefill(lengths)
    for _ in range(steps):
        run.step()
    assert run.near_ties() == 0, "choose another seed"
    return run


def test_the_table_model_is_a_causal_lm():
    assert isinstance(MODEL, CausalLM)


@pytest.mark.slow
def test_algorithm_1_on_three_prompts():
    """flush=1, decision for decision; the slow tests take every branch."""
    assert set(play(1, "planted", 0, LENGTHS[0], 30).taken()) > {
        "recent to high",
        "recent to low",
        "recent to dropped",
    }


def stays_as_it_is(run: Run, request: int, steps: int) -> None:
    """Steps of the other requests change nothing that `request` holds."""
    before = {at: held for at, held in run.held.items() if at[1] == request}
    for _ in range(steps):
        run.step(active=tuple(i != request for i in range(REQUESTS)))
    for at, held in before.items():
        for position, (tier, k, v, score) in held.items():
            again = run.held[at][position]
            assert (
                (again[0], again[3]) == (tier, score)
                and np.array_equal(again[1], k)
                and np.array_equal(again[2], v)
            )


@pytest.mark.slow
def test_requests_that_have_ended_stay_as_they_are():
    stays_as_it_is(play(1, "planted", 2, LENGTHS[2], 4), request=1, steps=6)


@pytest.mark.slow
def test_requests_that_have_ended_between_two_events_stay_as_they_are():
    """An event comes after every `flush` steps of a request, so one that ended before has none."""
    stays_as_it_is(play(4, "planted", 2, LENGTHS[2], 6, cache_dtype="bfloat16"), request=1, steps=6)


@pytest.mark.daily(3)
@pytest.mark.parametrize("mistake", ["threshold", "window", "observed"])
def test_the_comparison_sees_other_decisions(mistake: str):
    run = Run(1, "planted", 0)
    for head in run.heads.values():
        head.alpha_high *= 1.3 if mistake == "threshold" else 1
        head.window += mistake == "window"
        head.observe += mistake == "observed"
    with pytest.raises(AssertionError):
        run.prefill(LENGTHS[1])
        for _ in range(10):
            run.step()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["planted", "recorded"])
@pytest.mark.parametrize("flush, cache_dtype", [(1, "float32"), (4, "bfloat16"), (32, "float32")])
def test_every_decision(flush: int, cache_dtype: str, kind: str):
    """Prompts shorter than the window, of one chunk and of several; every branch is taken."""
    branches = Counter()
    for seed, lengths in enumerate(LENGTHS, 20 if kind == "recorded" else 0):  # without near ties
        branches += play(flush, kind, seed, lengths, STEPS, cache_dtype=cache_dtype).taken()
    assert set(branches) == BRANCHES, branches
