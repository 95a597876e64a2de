"""Compiled steps on a small pool, and what must hold of its pages after each."""

import dataclasses
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffkv_jax import CacheSpec, CompressionPolicy, KVCache, Thresholds, diffkv
from diffkv_jax.cache.cache import empty_cache
from diffkv_jax.cache.pool_size import bound
from diffkv_jax.steps.jitted import decode_step, prefill_chunk
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.readback import page_ids_in_use, slot_addresses
from diffkv_jax.testing.tiny import prompt, tiny_model

REQUESTS, CHUNK, MAX_LEN, LANES, PAGES = 3, 32, 160, 16, 90
WINDOW, FLUSH = 8, 4
POLICIES = {
    "diffkv": diffkv(queries=16, window=WINDOW, flush=FLUSH),
    "flush 1": diffkv(queries=16, window=WINDOW, flush=1),
    "all rows": diffkv(tiers=("K8V4:2,2", "K4V2"), queries="all", window=WINDOW, flush=FLUSH),
    "none": CompressionPolicy.none(window=WINDOW, flush=FLUSH),
}


class Program(NamedTuple):
    """The compiled steps of one policy on a model of two layers and two KV heads."""

    model: object
    params: object
    policy: CompressionPolicy
    spec: CacheSpec
    step: object  # (params, cache, token [R], active [R]) -> logits, cache; not donated

    @property
    def heads(self) -> int:
        """Heads of one request that own pages."""
        return len(self.spec.paged_layers) * self.spec.attention.num_kv_heads

    def empty(self, alpha=((0.0, 0.0),) * REQUESTS, free: int = PAGES) -> KVCache:
        """No tokens; thresholds (high, low) for each request; only `free` of the pages can be
        had.
        """
        policy = self.policy
        if isinstance(policy.keep, Thresholds):
            high, low = ([[[one[i]] for one in alpha]] for i in range(2))
            keep = Thresholds(alpha_high=high, alpha_low=low)
            policy = dataclasses.replace(policy, keep=keep)
        cache = empty_cache(self.spec, bound(self.spec, policy))
        return with_free_pages(cache, free)

    def prompt(
        self, cache: KVCache, lengths, last: bool = True, seed: int = 0
    ) -> tuple[np.ndarray, KVCache]:
        """One prompt chunk, right-aligned; flags of earlier failures are cleared as `generate`
        does.
        """
        tokens = np.zeros((REQUESTS, CHUNK), np.int32)
        for i, n in enumerate(lengths):
            tokens[i, CHUNK - n :] = prompt(n, seed=seed + i)
        cache = jax.tree.map(jnp.copy, cache)
        cache = with_part(cache, "counters.overflow", jnp.zeros(REQUESTS, bool))
        length = jnp.asarray(lengths, jnp.int32)
        logits, cache = prefill_chunk(
            self.model, self.params, cache, jnp.asarray(tokens), length, jnp.asarray(last)
        )
        return np.asarray(logits), cache

    def decode(
        self, cache: KVCache, steps: int, active=(True,) * REQUESTS, seed: int = 0
    ) -> tuple[np.ndarray, list[KVCache]]:
        """Logits [steps, R, vocab] and the cache after each step; requests without pages stop, as
        in `generate`.
        """
        tokens = np.random.default_rng(seed).integers(0, 97, (steps, REQUESTS)).astype(np.int32)
        logits, caches = [], [cache]
        for token in tokens:
            row, cache = self.step(
                self.params,
                caches[-1],
                jnp.asarray(token),
                jnp.asarray(active) & ~caches[-1].counters.overflow,
            )
            logits.append(np.asarray(row))
            caches.append(cache)
        return np.stack(logits), caches[1:]

    def most_pages(self, tokens: int) -> int:
        """Pages that a request may need to take in `tokens` tokens: all in the high tier, and a new
        page of the other.
        """
        return self.heads * (self.spec.layout.pages_for(0, tokens) + self.spec.layout.tiers)


@lru_cache
def program(name: str) -> Program:
    model, params = tiny_model(q_heads=4, kv_heads=2)
    build = partial(
        CacheSpec.build,
        num_requests=REQUESTS,
        max_len=MAX_LEN,
        num_pages=PAGES,
        dtype="float32",
        tokens=LANES,
    )
    return Program(
        model,
        params,
        POLICIES[name],
        build(model.attention, POLICIES[name]),
        jax.jit(partial(decode_step, model)),
    )


def with_free_pages(cache: KVCache, count: int) -> KVCache:
    """The cache with at most `count` free pages; the others are nobody's."""
    return with_part(cache, "stored.ring.count", jnp.minimum(cache.stored.ring.count, count))


def positions(cache: KVCache, layer: int, request: int, head: int) -> np.ndarray:
    """Positions of the stored tokens of a head, tier by tier."""
    at, found = (layer, request, head), []
    for tier, length in enumerate(np.asarray(cache.stored.tier_len)[at]):
        slots = slot_addresses(
            cache.spec.layout, np.asarray(cache.stored.page_table)[at], tier, int(length)
        )
        found.append(np.asarray(cache.stored.pages.position)[slots])
    return np.concatenate(found).astype(int)


def check_invariants(cache: KVCache, hidden: set[int], keeps_all: np.ndarray) -> None:
    """Pages are owned once, free, or `hidden`; positions are distinct and in range; requests that
    drop nothing hold everything.
    """
    spec = cache.spec
    used = page_ids_in_use(
        spec.layout, cache.stored.page_table, cache.stored.tier_len, spec.num_pages
    )
    ids, start, count = (
        np.asarray(cache.stored.ring.ids),
        int(cache.stored.ring.start),
        int(cache.stored.ring.count),
    )
    free = [int(ids[(start + i) % spec.num_pages]) for i in range(count)]
    assert sorted([*used, *free, *hidden]) == list(range(spec.num_pages)), "each page exactly once"
    seq_len, recent_len = np.asarray(cache.counters.seq_len), np.asarray(cache.counters.recent_len)
    assert (recent_len <= np.minimum(seq_len, spec.window + spec.flush)).all() and (
        seq_len >= 0
    ).all()
    for layer, request, head in np.ndindex(cache.stored.tier_len.shape[:3]):
        stored, left = (
            positions(cache, layer, request, head),
            seq_len[request] - recent_len[request],
        )
        assert len(set(stored)) == len(stored) and (stored >= 0).all() and (stored < left).all()
        assert not keeps_all[request] or len(stored) == left, (
            f"request {request} drops nothing and lost a token"
        )


def check_flags(program: Program, before: KVCache, after: KVCache, tokens: np.ndarray) -> None:
    """A request is flagged only if it and those before it may have wanted more pages than were
    free.
    """
    worst = np.cumsum([program.most_pages(int(n)) for n in tokens])
    new = np.asarray(after.counters.overflow) & ~np.asarray(before.counters.overflow)
    assert (~new | (worst > int(before.stored.ring.count))).all(), (
        f"flags {new} with {before.stored.ring.count} pages free, at most {worst} wanted"
    )
