"""Pages through random sequences of prompts and decode steps, and what happens when there are none
left.
"""

import dataclasses
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from diffkv_jax import CacheSpec, CompressionPolicy, KVCache, Thresholds, diffkv
from diffkv_jax.cache.cache import complete, empty_cache, without_empty
from diffkv_jax.cache.pool_size import bound
from diffkv_jax.steps.jitted import decode_step, prefill_chunk
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
LONG = pytest.param("flush 1", marks=(pytest.mark.slow, pytest.mark.long))
OTHERS = [*(pytest.param(name, marks=pytest.mark.slow) for name in ("all rows", "none")), LONG]


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
        cache = dataclasses.replace(
            jax.tree.map(jnp.copy, cache), overflow=jnp.zeros(REQUESTS, bool)
        )
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
                jnp.asarray(active) & ~caches[-1].overflow,
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
    return dataclasses.replace(
        cache, ring=dataclasses.replace(cache.ring, count=jnp.minimum(cache.ring.count, count))
    )


def positions(cache: KVCache, layer: int, request: int, head: int) -> np.ndarray:
    """Positions of the stored tokens of a head, tier by tier."""
    at, found = (layer, request, head), []
    for tier, length in enumerate(np.asarray(cache.tier_len)[at]):
        slots = slot_addresses(
            cache.spec.layout, np.asarray(cache.page_table)[at], tier, int(length)
        )
        found.append(np.asarray(cache.pages.position)[slots])
    return np.concatenate(found).astype(int)


def check_invariants(cache: KVCache, hidden: set[int], keeps_all: np.ndarray) -> None:
    """Pages are owned once, free, or `hidden`; positions are distinct and in range; requests that
    drop nothing hold everything.
    """
    spec = cache.spec
    used = page_ids_in_use(spec.layout, cache.page_table, cache.tier_len, spec.num_pages)
    ids, start, count = np.asarray(cache.ring.ids), int(cache.ring.start), int(cache.ring.count)
    free = [int(ids[(start + i) % spec.num_pages]) for i in range(count)]
    assert sorted([*used, *free, *hidden]) == list(range(spec.num_pages)), "each page exactly once"
    seq_len, recent_len = np.asarray(cache.seq_len), np.asarray(cache.recent_len)
    assert (recent_len <= np.minimum(seq_len, spec.window + spec.flush)).all() and (
        seq_len >= 0
    ).all()
    for layer, request, head in np.ndindex(cache.tier_len.shape[:3]):
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
    new = np.asarray(after.overflow) & ~np.asarray(before.overflow)
    assert (~new | (worst > int(before.ring.count))).all(), (
        f"flags {new} with {before.ring.count} pages free, at most {worst} wanted"
    )


ALPHAS = st.sampled_from(
    [(0.0, 0.0), (1.0, 0.0), (1.0, 0.3), (3.0, 1.0), (0.5, 0.5), (20.0, 0.0), (20.0, 20.0)]
)
FREE = st.sampled_from([3, 10, 20, 40, PAGES])
LENGTH = st.one_of(st.just(0), st.integers(1, CHUNK))
PROMPT = st.tuples(st.just("prompt"), st.tuples(*[LENGTH] * REQUESTS), st.booleans())
DECODE = st.tuples(
    st.just("decode"),
    st.tuples(*[st.sampled_from([True] * 5 + [False])] * REQUESTS),
    st.integers(1, 6),
)


def run_operations(program: Program, alpha, free: int, operations) -> None:
    """As in `generate`, a request that sat out a step goes on only once its window has been emptied
    by a prompt.
    """
    cache, live = program.empty(alpha, free), np.full(REQUESTS, True)
    hidden = {int(i) for i in cache.ring.ids[free:]}
    keeps_all = np.array([low == 0 for _, low in alpha])
    for seed, (kind, which, how) in enumerate(operations):
        room = MAX_LEN - np.asarray(cache.seq_len)
        waiting = np.asarray(cache.recent_len)
        if kind == "prompt":
            lengths = np.minimum(which, room)
            _, after = program.prompt(cache, lengths, how, seed)
            cleared = dataclasses.replace(cache, overflow=jnp.zeros(REQUESTS, bool))
            check_flags(program, cleared, after, lengths + waiting)
            gone = np.asarray(after.overflow)
            assert (
                not np.asarray(after.tier_len)[:, gone].any()
                and not np.asarray(after.seq_len)[gone].any()
            )
            steps, live = [after], np.asarray(after.recent_len) <= WINDOW
        else:
            live = live & which & (room >= how)
            _, steps = program.decode(cache, how, live, seed)
            for one, other in zip([cache, *steps], steps, strict=False):
                check_flags(program, one, other, np.full(REQUESTS, program.spec.flush))
                assert (np.asarray(other.overflow) >= np.asarray(one.overflow)).all()
        for cache in steps:
            check_invariants(cache, hidden, keeps_all)


OPERATIONS = {
    "alpha": st.tuples(*[ALPHAS] * REQUESTS),
    "free": FREE,
    "operations": st.lists(PROMPT | DECODE, min_size=2, max_size=8),
}


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(**OPERATIONS)
def test_random_operations(alpha, free, operations):
    run_operations(program("diffkv"), alpha, free, operations)


@pytest.mark.parametrize(
    "name", [*OTHERS, pytest.param("diffkv", marks=(pytest.mark.slow, pytest.mark.long))]
)
@settings(max_examples=40, deadline=None)
@given(**OPERATIONS)
def test_more_random_operations(name, alpha, free, operations):
    run_operations(program(name), alpha, free, operations)


@pytest.mark.slow
def test_the_checks_reject_damage():
    run = program("diffkv")
    _, cache = run.prompt(run.empty(), (32, 20, 9))
    hidden, keeps = set(), np.full(REQUESTS, True)
    check_invariants(cache, hidden, keeps)
    lost = dataclasses.replace(
        cache, ring=dataclasses.replace(cache.ring, count=cache.ring.count - 1)
    )
    dead_id = dataclasses.replace(cache, page_table=cache.page_table.at[0, 0, 0, 5].set(3))
    shared = dataclasses.replace(
        cache, page_table=cache.page_table.at[0, 0, 0, 0].set(cache.page_table[0, 1, 0, 0])
    )
    shorter = dataclasses.replace(cache, tier_len=cache.tier_len.at[1, 0, 0, 0].add(-1))
    twice = dataclasses.replace(
        cache, pages=dataclasses.replace(cache.pages, position=jnp.zeros_like(cache.pages.position))
    )
    for damaged in (lost, dead_id, shared, shorter, twice):
        with pytest.raises(AssertionError):
            check_invariants(damaged, hidden, keeps)
    with pytest.raises(AssertionError):
        check_flags(
            run,
            cache,
            dataclasses.replace(cache, overflow=jnp.array([False, True, False])),
            np.full(REQUESTS, 4),
        )


@pytest.mark.slow
def test_pausing_loses_no_token():
    """A request that sits out the step of an event and then goes on: its window must not run
    over.
    """
    run = program("diffkv")
    _, cache = run.prompt(run.empty(), (20, 20, 20))
    for steps, first in ((FLUSH - 1, True), (1, False), (FLUSH, True)):
        _, caches = run.decode(cache, steps, active=(first, True, True))
        cache = caches[-1]
        check_invariants(cache, set(), np.full(REQUESTS, True))


@pytest.mark.parametrize(
    "others", [(0.0, 0.0), (20.0, 0.0), (20.0, 20.0)], ids=["high", "low", "dropped"]
)
def test_starvation_in_decode(others):
    """Request 1 finds no page at its first event; the others' logits do not change by a bit, its
    stored tokens not at all.
    """
    run, steps = program("diffkv"), 3 * FLUSH
    per_page = run.spec.layout.tokens_per_page(0)
    lengths = (WINDOW + 1, WINDOW + per_page, WINDOW + 3)
    assert max(lengths) <= CHUNK and per_page >= 3 + steps
    _, start = run.prompt(run.empty((others, (0.0, 0.0), others)), lengths)
    ample, ample_caches = run.decode(start, steps)
    tiny, caches = run.decode(with_free_pages(start, run.heads - 1), steps)
    assert not any(np.asarray(cache.overflow).any() for cache in ample_caches)
    for step, (one, other, cache) in enumerate(zip(ample, tiny, caches, strict=True)):
        np.testing.assert_array_equal(one[[0, 2]], other[[0, 2]], err_msg=f"step {step}")
        assert np.asarray(cache.overflow).tolist() == [False, step >= FLUSH - 1, False]
    before, after = caches[FLUSH - 2], caches[-1]
    assert (
        int(after.seq_len[1]) == lengths[1] + FLUSH and int(after.recent_len[1]) == WINDOW + FLUSH
    )
    for name in ("page_table", "tier_len"):
        np.testing.assert_array_equal(getattr(before, name)[:, 1], getattr(after, name)[:, 1])
    pages = np.asarray(before.page_table[:, 1])
    pages = pages[pages < PAGES]
    for name in ("payload", "meta", "position"):
        np.testing.assert_array_equal(
            getattr(before.pages, name)[pages], getattr(after.pages, name)[pages]
        )
    np.testing.assert_array_equal(
        before.recent_k[:, 1, :, : WINDOW + FLUSH - 1],
        after.recent_k[:, 1, :, : WINDOW + FLUSH - 1],
    )


def test_starvation_in_a_prompt():
    """Request 1 finds pages in the first layer and none in the second: it is emptied, the others do
    not notice.
    """
    run = program("diffkv")
    layout, kv_heads = run.spec.layout, run.spec.attention.num_kv_heads
    lengths = (WINDOW + 1, CHUNK, WINDOW + 2)
    # a layer, with thresholds that keep all tokens high
    need = [kv_heads * layout.pages_for(0, n - WINDOW) for n in lengths]
    assert need[1] > need[2]
    free = sum(need) + need[0] + need[1] - 1
    wanted, _ = run.prompt(run.empty(), lengths)
    got, cache = run.prompt(run.empty(free=free), lengths)
    np.testing.assert_array_equal(got[[0, 2]], wanted[[0, 2]])
    assert np.asarray(cache.overflow).tolist() == [False, True, False]
    assert np.asarray(cache.seq_len).tolist() == [lengths[0], 0, lengths[2]]
    assert (
        not np.asarray(cache.tier_len)[:, 1].any()
        and (np.asarray(cache.page_table)[:, 1] == PAGES).all()
    )
    assert int(cache.ring.count) == free - 2 * (need[0] + need[2])
    check_invariants(cache, {int(i) for i in run.empty().ring.ids[free:]}, np.full(REQUESTS, True))


def test_starvation_in_a_prompt_does_not_spread():
    """Requests 0 and 2 fit the pool without request 1, which does not fit: only 1 is flagged."""
    run = program("diffkv")
    kv_heads, pages_for = run.spec.attention.num_kv_heads, run.spec.layout.pages_for
    lengths = (WINDOW + 1, CHUNK, WINDOW + 2)
    need = [kv_heads * pages_for(0, n - WINDOW) for n in lengths]
    _, cache = run.prompt(run.empty(free=sum(need) + 1), lengths)
    assert 2 * (need[0] + need[2]) <= sum(need) + 1
    assert np.asarray(cache.overflow).tolist() == [False, True, False]


def poisoned(cache: KVCache) -> KVCache:
    """Everything that no token occupies overwritten: free pages, dead lanes, dead recent slots
    (their significance must stay 0).
    """
    cache, spec = complete(cache), cache.spec
    pages = jax.tree.map(np.array, cache.pages)
    live = np.zeros(pages.position.shape, bool)
    for at in np.ndindex(cache.tier_len.shape[:3]):
        for tier, length in enumerate(np.asarray(cache.tier_len)[at]):
            live[
                slot_addresses(spec.layout, np.asarray(cache.page_table)[at], tier, int(length))
            ] = True
    lanes = live.any(axis=1, keepdims=True)
    pages.payload[np.broadcast_to(~lanes, pages.payload.shape)] = 255
    pages.meta[np.broadcast_to(~lanes, pages.meta.shape)] = np.nan
    pages.position[~live] = np.iinfo(pages.position.dtype).max
    if spec.layout.scored:
        pages.significance[~live] = np.nan
    dead = (np.arange(spec.window + spec.flush) >= np.asarray(cache.recent_len)[:, None])[
        None, :, None, :, None
    ]
    recent_k, recent_v = (jnp.where(dead, jnp.nan, x) for x in (cache.recent_k, cache.recent_v))
    return without_empty(
        dataclasses.replace(
            cache, pages=jax.tree.map(jnp.asarray, pages), recent_k=recent_k, recent_v=recent_v
        )
    )


@pytest.mark.parametrize("name", ["diffkv", *OTHERS])
def test_nothing_dead_is_read(name):
    run = program(name)
    _, cache = run.prompt(run.empty(((1.0, 0.3), (3.0, 0.5), (0.0, 0.0))), (32, 5, 20), last=False)
    _, caches = run.decode(cache, 5)
    results = []
    for start in (caches[-1], poisoned(caches[-1])):
        first, one = run.decode(start, 6, seed=1)
        last, two = run.prompt(
            one[-1] if start is caches[-1] else poisoned(one[-1]), (32, 7, 11), seed=5
        )
        more, three = run.decode(two, 6, seed=2)
        results.append(
            (first, last, more, two.page_table, three[-1].tier_len, three[-1].recent_significance)
        )
    # None where nothing is scored
    for clean, dirty in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.isfinite(np.asarray(clean)).all()
        np.testing.assert_array_equal(clean, dirty)
