"""A cache and one slow model a head side by side, on the tables of `table_model`: a dense
evaluation of what the cache holds (read back from its pages by NumPy) gives the probabilities that
the cache must have computed; the slow model decides from those.
"""

import dataclasses
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
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
    WINDOW,
    tables,
)

from diffkv_jax import diffkv, make_cache
from diffkv_jax.batching import chunks
from diffkv_jax.policy.stage import with_leaves
from diffkv_jax.steps.jitted import decode_step, prefill_chunk
from diffkv_jax.testing.readback import check_pool, held_tokens
from oracles.algorithm1 import Head
from oracles.forgetting import Forgetting

# relative distance below which float32 sums and float64 probabilities may decide differently
NEAR = 1e-5


class Watched(Head):
    """A slow model that refuses near ties, where rounding may decide, and counts which branches of
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


class WatchedForgetting(Watched, Forgetting):
    """Likewise, with a mean over about the last queries."""


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

    def __init__(
        self, flush: int, kind: str, seed: int, cache_dtype: str = "float32", forgets: bool = False
    ):
        self.tables, self.flush = tables(kind, seed), flush
        rng = np.random.default_rng(seed)
        high = rng.choice([0.5, 1.0, 1.6], (LAYERS, REQUESTS, KV_HEADS))
        self.alpha = np.stack(
            [high, high * rng.choice([0.0, 0.15, 0.5, 1.0], high.shape, p=[0.1, 0.35, 0.35, 0.2])],
            axis=-1,
        ).astype(np.float32)
        options = {"queries": OBSERVE, "window": WINDOW, "flush": flush, "forgets": forgets}
        policy = diffkv(2.0, 0.1, **options)
        cache = make_cache(MODEL, policy, [MAX_LEN] * REQUESTS, cache_dtype=cache_dtype)
        high, low = (jnp.asarray(self.alpha[..., i]) for i in range(2))
        keep = with_leaves(cache.policy.keep, alpha_high=high, alpha_low=low)
        policy = with_leaves(cache.policy, keep=keep)
        self.cache = dataclasses.replace(cache, policy=policy)
        slow = WatchedForgetting if forgets else Watched
        self.heads = {
            at: slow(*self.alpha[at], window=WINDOW, flush=flush, observe=OBSERVE)
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
        """Feed the prompts (with `forgets` also to a cache that holds some; 0 tokens: none); the
        slow models get the column sums of the last chunk over what was
        held before it and the chunk itself.
        """
        sums = {}
        for _, real, last in chunks(
            np.zeros((REQUESTS, max(lengths)), np.int32), np.array(lengths), CHUNK
        ):
            self.read()
            for at in self.heads if last else ():
                if not real[at[1]]:
                    continue
                n, old = int(real[at[1]]), self.keys(at)
                first = self.heads[at].seen + lengths[at[1]] - n
                q, own = self.exact(at, first, n)
                logits = q @ np.concatenate([old, own]).T * SPEC.sm_scale
                logits[:, np.arange(logits.shape[2]) > len(old) + np.arange(n)[:, None]] = -np.inf
                column = softmax(logits)[:, max(n - OBSERVE, 0) :].sum(axis=1).max(axis=0)
                sums[at] = dict(
                    zip(
                        [*self.held[at], *range(first, first + n)],
                        column,
                        strict=True,
                    )
                )
            tokens = jnp.zeros((REQUESTS, CHUNK), jnp.int32)
            _, self.cache = prefill_chunk(
                MODEL, self.tables, self.cache, tokens, jnp.asarray(real), jnp.asarray(last)
            )
        for at, head in self.heads.items():
            if at in sums:
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
