"""Pages through random sequences of prompts and decode steps, and what happens when there are none
left.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from admission_program import (
    CHUNK,
    FLUSH,
    MAX_LEN,
    PAGES,
    REQUESTS,
    WINDOW,
    Program,
    check_flags,
    check_invariants,
    program,
    with_free_pages,
)
from hypothesis import given, settings, strategies as st

from diffkv_jax import KVCache
from diffkv_jax.cache.cache import complete, without_empty
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.readback import slot_addresses

LONG = pytest.param("flush 1", marks=(pytest.mark.slow, pytest.mark.long))
OTHERS = [*(pytest.param(name, marks=pytest.mark.slow) for name in ("all rows", "none")), LONG]
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
    hidden = {int(i) for i in cache.stored.ring.ids[free:]}
    keeps_all = np.array([low == 0 for _, low in alpha])
    for seed, (kind, which, how) in enumerate(operations):
        room = MAX_LEN - np.asarray(cache.counters.seq_len)
        waiting = np.asarray(cache.counters.recent_len)
        if kind == "prompt":
            lengths = np.minimum(which, room)
            _, after = program.prompt(cache, lengths, how, seed)
            cleared = with_part(cache, "counters.overflow", jnp.zeros(REQUESTS, bool))
            check_flags(program, cleared, after, lengths + waiting)
            gone = np.asarray(after.counters.overflow)
            assert (
                not np.asarray(after.stored.tier_len)[:, gone].any()
                and not np.asarray(after.counters.seq_len)[gone].any()
            )
            steps, live = [after], np.asarray(after.counters.recent_len) <= WINDOW
        else:
            live = live & which & (room >= how)
            _, steps = program.decode(cache, how, live, seed)
            for one, other in zip([cache, *steps], steps, strict=False):
                check_flags(program, one, other, np.full(REQUESTS, program.spec.flush))
                assert (
                    np.asarray(other.counters.overflow) >= np.asarray(one.counters.overflow)
                ).all()
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
    lost = with_part(cache, "stored.ring.count", cache.stored.ring.count - 1)
    dead_id = with_part(cache, "stored.page_table", cache.stored.page_table.at[0, 0, 0, 5].set(3))
    shared = with_part(
        cache,
        "stored.page_table",
        cache.stored.page_table.at[0, 0, 0, 0].set(cache.stored.page_table[0, 1, 0, 0]),
    )
    shorter = with_part(cache, "stored.tier_len", cache.stored.tier_len.at[1, 0, 0, 0].add(-1))
    twice = with_part(cache, "stored.pages.position", jnp.zeros_like(cache.stored.pages.position))
    for damaged in (lost, dead_id, shared, shorter, twice):
        with pytest.raises(AssertionError):
            check_invariants(damaged, hidden, keeps)
    with pytest.raises(AssertionError):
        check_flags(
            run,
            cache,
            with_part(cache, "counters.overflow", jnp.array([False, True, False])),
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
    assert not any(np.asarray(cache.counters.overflow).any() for cache in ample_caches)
    for step, (one, other, cache) in enumerate(zip(ample, tiny, caches, strict=True)):
        np.testing.assert_array_equal(one[[0, 2]], other[[0, 2]], err_msg=f"step {step}")
        assert np.asarray(cache.counters.overflow).tolist() == [False, step >= FLUSH - 1, False]
    before, after = caches[FLUSH - 2], caches[-1]
    assert (
        int(after.counters.seq_len[1]) == lengths[1] + FLUSH
        and int(after.counters.recent_len[1]) == WINDOW + FLUSH
    )
    for name in ("page_table", "tier_len"):
        old, new = (getattr(cache.stored, name)[:, 1] for cache in (before, after))
        np.testing.assert_array_equal(old, new)
    pages = np.asarray(before.stored.page_table[:, 1])
    pages = pages[pages < PAGES]
    for name in ("payload", "meta", "position"):
        np.testing.assert_array_equal(
            getattr(before.stored.pages, name)[pages], getattr(after.stored.pages, name)[pages]
        )
    np.testing.assert_array_equal(
        before.recent.k[:, 1, :, : WINDOW + FLUSH - 1],
        after.recent.k[:, 1, :, : WINDOW + FLUSH - 1],
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
    assert np.asarray(cache.counters.overflow).tolist() == [False, True, False]
    assert np.asarray(cache.counters.seq_len).tolist() == [lengths[0], 0, lengths[2]]
    assert (
        not np.asarray(cache.stored.tier_len)[:, 1].any()
        and (np.asarray(cache.stored.page_table)[:, 1] == PAGES).all()
    )
    assert int(cache.stored.ring.count) == free - 2 * (need[0] + need[2])
    check_invariants(
        cache, {int(i) for i in run.empty().stored.ring.ids[free:]}, np.full(REQUESTS, True)
    )


def test_starvation_in_a_prompt_does_not_spread():
    """Requests 0 and 2 fit the pool without request 1, which does not fit: only 1 is flagged."""
    run = program("diffkv")
    kv_heads, pages_for = run.spec.attention.num_kv_heads, run.spec.layout.pages_for
    lengths = (WINDOW + 1, CHUNK, WINDOW + 2)
    need = [kv_heads * pages_for(0, n - WINDOW) for n in lengths]
    _, cache = run.prompt(run.empty(free=sum(need) + 1), lengths)
    assert 2 * (need[0] + need[2]) <= sum(need) + 1
    assert np.asarray(cache.counters.overflow).tolist() == [False, True, False]


def poisoned(cache: KVCache) -> KVCache:
    """Everything that no token occupies overwritten: free pages, dead lanes, dead recent slots
    (their significance must stay 0).
    """
    cache, spec = complete(cache), cache.spec
    pages = jax.tree.map(np.array, cache.stored.pages)
    live = np.zeros(pages.position.shape, bool)
    for at in np.ndindex(cache.stored.tier_len.shape[:3]):
        for tier, length in enumerate(np.asarray(cache.stored.tier_len)[at]):
            live[
                slot_addresses(
                    spec.layout, np.asarray(cache.stored.page_table)[at], tier, int(length)
                )
            ] = True
    lanes = live.any(axis=1, keepdims=True)
    pages.payload[np.broadcast_to(~lanes, pages.payload.shape)] = 255
    pages.meta[np.broadcast_to(~lanes, pages.meta.shape)] = np.nan
    pages.position[~live] = np.iinfo(pages.position.dtype).max
    if spec.layout.scored:
        pages.significance[~live] = np.nan
    dead = (np.arange(spec.window + spec.flush) >= np.asarray(cache.counters.recent_len)[:, None])[
        None, :, None, :, None
    ]
    recent_k, recent_v = (jnp.where(dead, jnp.nan, x) for x in (cache.recent.k, cache.recent.v))
    cache = with_part(cache, "stored.pages", jax.tree.map(jnp.asarray, pages))
    recent = cache.recent._replace(k=recent_k, v=recent_v)
    return without_empty(with_part(cache, "recent", recent))


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
            (
                first,
                last,
                more,
                two.stored.page_table,
                three[-1].stored.tier_len,
                three[-1].recent.significance,
            )
        )
    # None where nothing is scored
    for clean, dirty in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.isfinite(np.asarray(clean)).all()
        np.testing.assert_array_equal(clean, dirty)
