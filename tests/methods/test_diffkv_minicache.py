"""DiffKV's tiers in the shallow layers, MiniCache's pairs in the deep ones, one pool: each part
holds what it holds alone, to the bit.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from layers_without_weights import CHUNK, DIM, FIRST, FLUSH, KV_HEADS, LAYERS, REQUESTS, WINDOW
from tiers_and_pairs import (
    DEEP,
    OPERATIONS,
    SHALLOW,
    TOTALS,
    differing,
    empty,
    follow,
    operate,
    stored,
    whole_run,
)

import diffkv_jax as dkv
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.readback import check_pool, held_tokens, page_ids_in_use
from oracles import minicache


@pytest.mark.slow
def test_shallow_layers_are_those_of_diffkv():
    """Tokens, tiers, codes and scores in pages and windows, and what attention gives, after every
    prompt chunk and event.
    """
    lengths = whole_run("both")[-1].cache.stored.tier_len
    assert not lengths[:FIRST, ..., 2].any() and not lengths[FIRST:, ..., 1].any()
    assert (lengths[:FIRST, ..., :2] > 2).all() and (
        lengths[:FIRST].sum(-1) < np.array(TOTALS)[:, None] - WINDOW - FLUSH
    ).all()
    for both, tiers in zip(whole_run("both"), whole_run("tiers"), strict=True):
        assert not differing(both.cache, tiers.cache, SHALLOW, scores=True)
        np.testing.assert_array_equal(both.out[:FIRST], tiers.out[:FIRST])
    other = whole_run("tiers", (1.0, 0.6))[-1]
    assert (
        differing(both.cache, other.cache, SHALLOW) > 10
        and np.abs(both.out - other.out)[:FIRST].max() > 1e-3
    )
    assert differing(both.cache, tiers.cache, DEEP) > 200


@pytest.mark.slow
def test_deep_layers_are_those_of_minicache():
    for both, pairs in zip(whole_run("both"), whole_run("pairs"), strict=True):
        assert not differing(both.cache, pairs.cache, DEEP)
        np.testing.assert_array_equal(both.out[FIRST:], pairs.out[FIRST:])
    assert differing(both.cache, pairs.cache, SHALLOW) > 200
    assert differing(both.cache, pairs.cache, DEEP, shift=1) > 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("retain", "right"),
    [(lambda angle: angle, True), (lambda angle: -angle, False)],
    ids=["text", "reversed"],
)
def test_the_tokens_that_pairs_share_are_those_of_the_equations(retain, right):
    """And the keys of eight bits are near the common direction times the layer's norm, values of
    four bits less so.
    """
    moments, requests = (
        whole_run("both"),
        [minicache.Request(LAYERS, KV_HEADS, DIM, FIRST, retain=retain) for _ in range(REQUESTS)],
    )
    for operation, moment in zip(OPERATIONS, moments, strict=True):
        for row, request in enumerate(requests):
            if isinstance(operation, tuple):
                arrivals = [slice(CHUNK - operation[0][row], CHUNK)]
            else:
                arrivals = [slice(first, first + FLUSH) for first in range(0, operation, FLUSH)]
            for new in arrivals:
                request.append(moment.k[:, row, new], moment.v[:, row, new])
                if isinstance(operation, tuple) or new.stop <= operation:
                    request.leave(WINDOW)
    agree, worst = True, [0.0, 0.0]
    for row, request in enumerate(requests):
        for layer in DEEP:
            for head in range(KV_HEADS):
                held = held_tokens(moments[-1].cache, layer, row, head)
                shared = {at for at, token in held.items() if token[0] == "shared"}
                agree &= shared == set(np.flatnonzero(request.shared[layer, :, head])) and sorted(
                    held
                ) == list(range(request.seen))
                for tensor in (0, 1):
                    found = np.stack([held[at][1 + tensor] for at in sorted(held)])
                    norms = np.linalg.norm(request.exact[tensor, layer, :, head], axis=-1)
                    far = np.abs(found - request.held[tensor, layer, :, head]).max(-1) / norms
                    worst[tensor] = max(worst[tensor], float(far.max()))
    assert agree == right
    assert (worst[0] < 5e-3 and worst[1] < 0.05) == right and (right or worst[0] > 0.3)


@pytest.mark.slow
def test_without_thresholds_it_is_minicache():
    for both, pairs in zip(whole_run("both", (0.0, 0.0)), whole_run("pairs"), strict=True):
        assert not differing(both.cache, pairs.cache, range(LAYERS))
        np.testing.assert_allclose(both.out, pairs.out, atol=1e-6)
    assert differing(whole_run("both")[-1].cache, pairs.cache, range(LAYERS)) > 200


def owners(cache: dkv.KVCache) -> list[set[int]]:
    """Pages of the shallow and of the deep layers."""
    parts = ((x[:FIRST], x[FIRST:]) for x in (cache.stored.page_table, cache.stored.tier_len))
    return [
        set(page_ids_in_use(cache.spec.layout, *part, cache.spec.num_pages))
        for part in zip(*parts, strict=True)
    ]


@pytest.mark.slow
def test_pages_are_owned_once_and_change_hands():
    """In a pool of just as many pages as are ever in use those that shallow layers give back serve
    deep ones later.
    """
    for moment in whole_run("both"):
        cache = moment.cache
        check_pool(
            cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring
        )
        assert not cache.counters.overflow.any()
    least = max(
        moment.cache.spec.num_pages - int(moment.cache.stored.ring.count)
        for moment in whole_run("both")
    )
    tight = [moment.cache for moment in follow(empty("both", free=least))]
    for small in tight:
        shallow, deep = owners(small)
        assert (
            not small.counters.overflow.any()
            and not shallow & deep
            and len(shallow | deep) + int(small.stored.ring.count) == least
        )
    assert not differing(small, whole_run("pairs")[-1].cache, DEEP)
    assert any(len(owners(earlier)[0] & deep) > 3 for earlier in tight)
    leak = with_part(cache, "stored.ring.count", cache.stored.ring.count - 1)
    with pytest.raises(AssertionError):
        check_pool(leak.spec.layout, leak.stored.page_table, leak.stored.tier_len, leak.stored.ring)


@pytest.mark.slow
def test_a_pool_that_suffices_is_not_taken_for_a_small_one():
    """The policy runs before the end of a prompt only where its chunk may not find its pages: in
    pairs those of both layers together.
    """
    layout, heads = empty("both").spec.layout, REQUESTS * KV_HEADS
    pair = 2 * layout.pages_for(0, 2) + layout.pages_for(2, 22)  # 24 tokens leave the window
    most = heads * (FIRST * (layout.pages_for(0, CHUNK) + 1) + pair)
    enough, too_few = (
        follow(empty("both", free=free), [((CHUNK, CHUNK), False)])[0].cache.stored.tier_len[:FIRST]
        for free in (most, most - 1)
    )
    assert (enough == [CHUNK - WINDOW, 0, 0]).all() and (too_few[..., 0] < CHUNK - WINDOW).sum() > 6


@pytest.mark.slow
def test_the_report_counts_both_kinds():
    cache = whole_run("both")[-1].cache
    report, layout = dkv.memory_report(cache), cache.spec.layout
    assert report.tier_names == ("K8V4", "K4V2", "shared K8V4")
    used = page_ids_in_use(
        layout, cache.stored.page_table, cache.stored.tier_len, cache.spec.num_pages
    )
    assert (
        report.pages.sum()
        == len(used)
        == report.pages[:FIRST, ..., :2].sum() + report.pages[FIRST:, ..., ::2].sum()
    )
    assert report.allocated == report.pool - int(cache.stored.ring.count) * (layout.page_bytes + 4)
    for layer, row, head in np.ndindex(LAYERS, REQUESTS, KV_HEADS):
        held = held_tokens(cache, layer, row, head)
        assert (
            report.tokens[layer, row, head].sum()
            == len(held)
            == TOTALS[row] - report.dropped[layer, row, head]
        )
        assert (report.dropped[layer, row, head] > 0) == (layer < FIRST)
    alone = dkv.memory_report(whole_run("tiers")[-1].cache)
    np.testing.assert_array_equal(
        report.logical_bytes[:FIRST, ..., :2], alone.logical_bytes[:FIRST, ..., :2]
    )
    # shared tokens fit where high ones do
    assert layout.page_bytes == whole_run("tiers")[-1].cache.spec.layout.page_bytes


def with_rubbish(cache: dkv.KVCache) -> dkv.KVCache:
    """The cache with rubbish in every page that nobody owns."""
    ring, pages = cache.stored.ring, cache.stored.pages
    free = jnp.asarray(
        [int(ring.ids[(ring.start + i) % len(ring.ids)]) for i in range(int(ring.count))], jnp.int32
    )
    rubbish = dataclasses.replace(
        pages,
        payload=pages.payload.at[free].set(255),
        meta=pages.meta.at[free].set(jnp.nan),
        significance=pages.significance.at[free].set(jnp.nan),
    )
    return with_part(cache, "stored.pages", rubbish)


@pytest.mark.slow
def test_dead_pages_are_never_read():
    for clean, rubbish in zip(
        whole_run("both"), follow(empty("both"), change=with_rubbish), strict=True
    ):
        assert not differing(clean.cache, rubbish.cache, range(LAYERS), scores=True)
        np.testing.assert_array_equal(clean.out, rubbish.out)

    def everywhere(cache: dkv.KVCache) -> dkv.KVCache:
        free = dataclasses.replace(cache.stored.ring, count=jnp.int32(cache.spec.num_pages))
        changed = with_rubbish(with_part(cache, "stored.ring", free))
        return with_part(changed, "stored.ring", cache.stored.ring)

    assert np.isnan(follow(empty("both"), OPERATIONS[:3], change=everywhere)[-1].out).any()


FULL = ((32, 32), True)


@pytest.mark.slow
def test_a_prompt_without_pages_leaves_no_trace():
    """Without its last page, one of the merged layers', a request gives up and gives back what its
    shallow layers have.
    """
    everything = follow(empty("both", (0.0, 0.0)), [FULL])[0].cache
    needed = everything.spec.num_pages - int(everything.stored.ring.count)
    cache = follow(empty("both", (0.0, 0.0), needed - 1), [FULL])[0].cache
    assert (
        cache.counters.overflow.tolist() == [False, True]
        and cache.counters.seq_len.tolist() == [32, 0]
        and not cache.stored.tier_len[:, 1].any()
    )
    assert int(cache.stored.ring.count) == needed - 1 - needed // 2
    used = page_ids_in_use(
        cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.spec.num_pages
    )
    free = [
        int(cache.stored.ring.ids[(cache.stored.ring.start + i) % cache.spec.num_pages])
        for i in range(int(cache.stored.ring.count))
    ]
    assert len({*used, *free}) == len(used) + len(free) == needed - 1
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        assert stored(cache, layer, 0, head, True) == stored(everything, layer, 0, head, True)


@pytest.mark.slow
def test_decode_without_pages_leaves_a_request_as_it_was():
    rng = np.random.default_rng(4)
    _, cache = operate(empty("both", (0.0, 0.0)), rng, FULL)
    before, cache = operate(cache, rng, 3 * FLUSH - 1)
    # an event
    after, _ = operate(with_part(cache, "stored.ring.count", jnp.int32(0)), rng, 1)
    assert (
        after.cache.counters.overflow.all()
        and after.cache.counters.recent_len.tolist() == [WINDOW + FLUSH] * REQUESTS
    )
    for name in ("page_table", "tier_len"):
        was, now = (getattr(out.cache.stored, name) for out in (before, after))
        np.testing.assert_array_equal(was, now)
