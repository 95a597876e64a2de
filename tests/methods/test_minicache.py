"""MiniCache: what two layers' pages decode to, attention over it, and the pages themselves, against
the equations in NumPy.
"""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers_without_weights import (
    CHUNK,
    DIM,
    FIRST,
    FLUSH,
    KV_HEADS,
    LAYERS,
    MODEL,
    REQUESTS,
    WINDOW,
    decode,
    draw,
)

import diffkv_jax as dkv
from diffkv_jax.cache.cache import empty_cache
from diffkv_jax.cache.pool_size import bound, with_pool
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.steps.jitted import prefill_chunk
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.readback import check_pool, held_tokens, page_ids_in_use
from oracles import minicache

POLICY = dkv.minicache(window=WINDOW, flush=FLUSH)
PROMPTS, STEPS, MORE, LAST_STEPS = ([11, 32, 32], [0, 8, 32]), 22, (20, 32), 5
NEAR = 5e-3  # where the norm of a vector rounds to another float16
TOTALS = [
    sum(prompt) + STEPS + more + LAST_STEPS for prompt, more in zip(PROMPTS, MORE, strict=True)
]


def empty(free: int | None = None) -> dkv.KVCache:
    """An empty cache with just the pages that its policy needs, or with only `free` of them."""
    build = partial(
        CacheSpec.build, num_requests=REQUESTS, max_len=160, num_pages=0, dtype="float32", tokens=16
    )
    spec = with_pool(build(MODEL.attention, POLICY), POLICY, TOTALS, TOTALS, None)
    cache = jax.jit(empty_cache, static_argnums=0)(spec, bound(spec, POLICY))
    count = jnp.int32(spec.num_pages if free is None else free)
    return with_part(cache, "stored.ring.count", count)


def follow(
    requests: list[minicache.Request], cache: dkv.KVCache, rng: np.random.Generator, lengths
) -> tuple[float, dkv.KVCache]:
    """One prompt chunk through the library and the reference: the largest difference of their
    outputs.
    """
    q, k, v = draw(rng, CHUNK)
    tokens = jnp.zeros((REQUESTS, CHUNK), jnp.int32)
    out, cache = prefill_chunk(
        MODEL, (q, k, v), cache, tokens, jnp.asarray(lengths), jnp.asarray(True)
    )
    worst = 0.0
    for row, (request, n) in enumerate(zip(requests, lengths, strict=True)):
        if n:
            request.append(k[:, row, -n:], v[:, row, -n:])
            worst = max(
                worst, np.abs(request.attend(q[:, row, -n:]) - np.asarray(out)[row][:, -n:]).max()
            )
            request.leave(WINDOW)
    return worst, cache


def follow_decode(
    requests, cache, rng, steps: int, active=(True,) * REQUESTS
) -> tuple[float, dkv.KVCache]:
    """Likewise some decode steps since a prompt; a compression event every FLUSH of them."""
    worst = 0.0
    for step in range(steps):
        q, k, v = draw(rng, 1)
        out, cache = decode((q, k, v), cache, jnp.zeros(REQUESTS, jnp.int32), jnp.asarray(active))
        for row, request in enumerate(requests):
            if active[row]:
                request.append(k[:, row], v[:, row])
                worst = max(worst, np.abs(request.attend(q[:, row]) - np.asarray(out)[row]).max())
                if (step + 1) % FLUSH == 0:
                    request.leave(WINDOW)
    return worst, cache


def references(**changes) -> list[minicache.Request]:
    return [minicache.Request(LAYERS, KV_HEADS, DIM, FIRST, **changes) for _ in range(REQUESTS)]


@lru_cache
def whole_run() -> tuple[dkv.KVCache, dict[str, list[minicache.Request]], dict[str, float]]:
    """Prompts of several lengths in chunks, decode, a second turn: the cache, references, and how
    far their outputs are from its.
    """
    variants = {
        "": {},
        "t": {"t": 0.4},
        "norms": {"swap_norms": True},
        "similar": {"retain": lambda angle: -angle},
        "unmerged": {"retention": 1.0},
    }
    everything, worst = {}, {}
    for name, changes in variants.items():
        rng, requests, cache, found = np.random.default_rng(1), references(**changes), empty(), []
        for lengths in zip(*PROMPTS, strict=True):
            far, cache = follow(requests, cache, rng, lengths)
            found.append(far)
        far, cache = follow_decode(requests, cache, rng, STEPS)
        found.append(far)
        far, cache = follow(requests, cache, rng, MORE)
        found.append(far)
        far, cache = follow_decode(requests, cache, rng, LAST_STEPS)
        everything[name], worst[name] = requests, max(*found, far)
    return cache, everything, worst


def distance(cache: dkv.KVCache, requests: list[minicache.Request]) -> float:
    """Largest difference between what the cache's pages and windows decode to and what the
    references hold.
    """
    worst = 0.0
    for row, request in enumerate(requests):
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                held = held_tokens(cache, layer, row, head)
                assert sorted(held) == list(range(request.seen))
                if not held:
                    continue
                for tensor in (0, 1):
                    found = np.stack([held[at][1 + tensor] for at in range(request.seen)])
                    worst = max(worst, np.abs(found - request.held[tensor, layer, :, head]).max())
    return worst


@pytest.mark.slow
def test_both_layers_decode_to_the_equations():
    cache, requests, _ = whole_run()
    assert distance(cache, requests[""]) < NEAR
    for wrong in ("t", "norms", "similar", "unmerged"):
        assert distance(cache, requests[wrong]) > 0.3, wrong


@pytest.mark.slow
def test_attention_reads_what_was_restored():
    _, _, worst = whole_run()
    assert worst[""] < 2e-3
    for wrong in ("t", "norms", "similar", "unmerged"):
        assert worst[wrong] > 0.05, wrong


@pytest.mark.slow
def test_the_most_different_tokens_stay_unmerged_in_both_layers():
    cache, requests, _ = whole_run()
    for row, request in enumerate(requests[""]):
        for head in range(KV_HEADS):
            layers = [held_tokens(cache, layer, row, head) for layer in (FIRST, FIRST + 1)]
            exact, shared = (
                [{at for at, token in held.items() if token[0] == tier} for held in layers]
                for tier in ("high", "low")
            )
            assert exact[0] == exact[1] and shared[0] == shared[1]
            assert shared[0] == set(np.flatnonzero(request.shared[FIRST, :, head]))
            assert (
                len(exact[0]) == np.ceil(0.05 * request.stored)
                and len(exact[0]) + len(shared[0]) == request.stored
            )
            assert not any(
                token[0] == "low" for token in held_tokens(cache, FIRST - 1, row, head).values()
            )


@pytest.mark.slow
def test_a_shared_page_is_owned_once():
    cache, requests, _ = whole_run()
    layout = cache.spec.layout
    check_pool(layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)
    tier_len = np.asarray(cache.stored.tier_len)
    assert (
        not tier_len[:FIRST, ..., 1].any()
        and not tier_len[FIRST, ..., 1].any()
        and tier_len[FIRST + 1, ..., 1].all()
    )
    report = dkv.memory_report(cache)
    assert report.pages.sum() == len(
        page_ids_in_use(
            layout, cache.stored.page_table, cache.stored.tier_len, cache.spec.num_pages
        )
    )
    assert not report.dropped.any()
    np.testing.assert_array_equal(report.tokens[FIRST], report.tokens[FIRST + 1])


def test_the_pool_is_just_large_enough():
    cache, requests, _ = whole_run()
    assert [request.seen for request in requests[""]] == TOTALS and not np.asarray(
        cache.counters.overflow
    ).any()
    # what the tokens in the windows may still take
    assert int(cache.stored.ring.count) < LAYERS * REQUESTS * KV_HEADS
    plain = dkv.CompressionPolicy.none(window=WINDOW, flush=FLUSH)
    build = partial(
        CacheSpec.build,
        MODEL.attention,
        num_requests=REQUESTS,
        max_len=160,
        num_pages=0,
        dtype="float32",
        tokens=16,
    )
    assert cache.spec.num_pages < with_pool(build(plain), plain, TOTALS, TOTALS, None).num_pages
    with pytest.raises(ValueError, match="smallest budget"):
        with_pool(build(POLICY), POLICY, TOTALS, TOTALS, 1000)


def check_free(cache: dkv.KVCache) -> None:
    """No page is owned twice or owned and free."""
    ids, start, count = (
        np.asarray(cache.stored.ring.ids),
        int(cache.stored.ring.start),
        int(cache.stored.ring.count),
    )
    used = page_ids_in_use(
        cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.spec.num_pages
    )
    free = [int(ids[(start + i) % len(ids)]) for i in range(count)]
    assert len(set(used + free)) == len(used) + len(free)


def test_a_prompt_without_pages_leaves_no_trace():
    """The last page that two requests of 24 tokens outside their windows need is one of the merged
    layers: without it one gives up.
    """
    _, cache = follow(references(), empty(), np.random.default_rng(3), (32, 32))
    needed = cache.spec.num_pages - int(cache.stored.ring.count)
    requests = references()
    _, cache = follow(requests, empty(needed - 1), np.random.default_rng(3), (32, 32))
    assert np.asarray(cache.counters.overflow).tolist() == [False, True]
    assert (
        int(cache.counters.seq_len[1]) == 0
        and int(cache.stored.ring.count) == needed - 1 - needed // 2
    )
    check_free(cache)
    assert distance(cache, [requests[0], *references()[1:]]) < NEAR


def test_decode_without_pages_leaves_a_request_as_it_was():
    rng, requests = np.random.default_rng(4), references()
    _, cache = follow(requests, empty(), rng, (32, 32))
    _, cache = follow_decode(requests, cache, rng, 3 * FLUSH - 1)
    before = jax.tree.map(np.asarray, (cache.stored.page_table, cache.stored.tier_len))
    pages, none = cache.stored.ring, dataclasses.replace(cache.stored.ring, count=jnp.int32(0))
    # an event, and a third page for every head
    _, cache = follow_decode(requests, with_part(cache, "stored.ring", none), rng, 1)
    assert (
        np.asarray(cache.counters.overflow).all()
        and np.asarray(cache.counters.recent_len).tolist() == [WINDOW + FLUSH] * REQUESTS
    )
    for old, new in zip(before, (cache.stored.page_table, cache.stored.tier_len), strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))
    assert distance(cache, requests) < NEAR
    cache = with_part(
        with_part(cache, "stored.ring", pages), "counters.overflow", jnp.zeros(REQUESTS, bool)
    )
    worst, cache = follow(requests, cache, rng, (32, 16))  # it goes on once there are pages
    assert worst < 2e-3 and distance(cache, requests) < NEAR
    check_free(cache)
