"""DiffKV's tiers in the shallow layers, MiniCache's pairs in the deep ones, one pool: each part
holds what it holds alone, to the bit.
"""

import dataclasses
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_minicache import (
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
from diffkv_jax.make_cache import make_cache
from diffkv_jax.methods.diffkv import MeanAttention
from diffkv_jax.methods.fastgen import HeadClasses
from diffkv_jax.methods.h2o import AttentionSum
from diffkv_jax.methods.key_norm import KeyNorm
from diffkv_jax.methods.pyramidinfer import PivotalContext
from diffkv_jax.pallas_kernels.dispatch import XLA
from diffkv_jax.read_prompts import prefill
from diffkv_jax.steps.jitted import prefill_chunk
from diffkv_jax.testing.readback import check_pool, held_tokens, page_ids_in_use
from diffkv_jax.testing.tiny import tiny_model
from oracles import minicache

ALPHA, OPTIONS = (1.0, 0.7), {"queries": 16, "window": WINDOW, "flush": FLUSH}
TIERS = dkv.diffkv(*ALPHA, **OPTIONS)
POLICIES = {
    "both": dataclasses.replace(TIERS, pairs=dkv.LayerPairs()),
    "tiers": TIERS,
    "pairs": dkv.minicache(inner="K8V4", window=WINDOW, flush=FLUSH),
}
SHALLOW, DEEP = range(FIRST), range(FIRST, LAYERS)
# tokens of each request in a prompt chunk and whether it is the last one, or decode steps
OPERATIONS = (
    ((11, 0), False),
    ((32, 8), False),
    ((32, 32), True),
    22,
    ((20, 32), True),
    5,
)
TOTALS = [
    sum(op[0][row] if isinstance(op, tuple) else op for op in OPERATIONS) for row in range(REQUESTS)
]


def empty(
    name: str, alpha: tuple[float, float] | None = None, free: int | None = None
) -> dkv.KVCache:
    """An empty cache with the pages that always suffice, or with only `free` of them."""
    policy = POLICIES[name]
    if alpha is not None:
        keep = dkv.Thresholds(alpha_high=alpha[0], alpha_low=alpha[1])
        policy = dataclasses.replace(policy, keep=keep)
    build = partial(
        CacheSpec.build, num_requests=REQUESTS, max_len=160, num_pages=0, dtype="float32", tokens=16
    )
    spec = with_pool(build(MODEL.attention, policy), policy, TOTALS, TOTALS, None)
    cache = jax.jit(empty_cache, static_argnums=0)(spec, bound(spec, policy))
    count = jnp.int32(spec.num_pages if free is None else free)
    return dataclasses.replace(cache, ring=dataclasses.replace(cache.ring, count=count))


class Moment(NamedTuple):
    """After an operation: what attention gave [L, ...], the exact keys and values that came, and
    the cache in NumPy.
    """

    out: np.ndarray
    k: np.ndarray  # [L, R, tokens, K, d]
    v: np.ndarray
    cache: dkv.KVCache


def operate(cache: dkv.KVCache, rng: np.random.Generator, operation) -> tuple[Moment, dkv.KVCache]:
    """One prompt chunk or some decode steps. The model has no weights: every policy sees the same
    queries, keys and values.
    """
    if isinstance(operation, tuple):
        lengths, last = operation
        inputs = draw(rng, CHUNK)
        tokens = jnp.zeros((REQUESTS, CHUNK), jnp.int32)
        out, cache = prefill_chunk(
            MODEL, inputs, cache, tokens, jnp.asarray(lengths), jnp.asarray(last)
        )
        outs, seen = (
            [
                np.where(
                    np.arange(CHUNK)[:, None, None]
                    >= CHUNK - np.reshape(lengths, (-1, 1, 1, 1, 1)),
                    out,
                    0,
                )
            ],
            [inputs],
        )
    else:
        outs, seen = [], []
        for _ in range(operation):
            inputs = draw(rng, 1)
            out, cache = decode(
                inputs, cache, jnp.zeros(REQUESTS, jnp.int32), jnp.ones(REQUESTS, bool)
            )
            outs.append(np.array(out))
            seen.append(inputs)
    k, v = (np.concatenate([inputs[i] for inputs in seen], axis=2) for i in (1, 2))
    return Moment(
        np.moveaxis(np.concatenate(outs, axis=2), 1, 0), k, v, jax.tree.map(np.array, cache)
    ), cache


def follow(cache: dkv.KVCache, operations=OPERATIONS, change=lambda cache: cache) -> list[Moment]:
    """The moments after each operation; `change` is done to the cache before it."""
    rng, moments = np.random.default_rng(1), []
    for operation in operations:
        moment, cache = operate(change(cache), rng, operation)
        moments.append(moment)
    return moments


@lru_cache
def whole_run(name: str, alpha: tuple[float, float] | None = None) -> list[Moment]:
    return follow(empty(name, alpha))


def stored(cache: dkv.KVCache, layer: int, row: int, head: int, scores: bool) -> dict[int, tuple]:
    """What a head holds, as things that compare: position to (tier, K, V, significance)."""
    held = held_tokens(cache, layer, row, head)
    second = "shared" if cache.spec.pairs is not None and layer >= FIRST else "low"
    names = {"high": "high", "low": second, "shared": second, "recent": "recent"}
    return {
        at: (names[tier], k.tobytes(), v.tobytes(), score if scores else 0)
        for at, (tier, k, v, score) in held.items()
    }


def differing(
    one: dkv.KVCache, other: dkv.KVCache, layers, scores: bool = False, shift: int = 0
) -> int:
    """Tokens that a head of one cache holds and that of the other does not, or otherwise; `shift`
    takes the next request's there.
    """
    count = 0
    for layer, row, head in np.ndindex(LAYERS, REQUESTS, KV_HEADS):
        if layer in layers:
            mine, theirs = (
                stored(one, layer, row, head, scores),
                stored(other, layer, (row + shift) % REQUESTS, head, scores),
            )
            count += sum(mine.get(at) != theirs.get(at) for at in mine.keys() | theirs.keys())
    return count


@pytest.mark.slow
def test_shallow_layers_are_those_of_diffkv():
    """Tokens, tiers, codes and scores in pages and windows, and what attention gives, after every
    prompt chunk and event.
    """
    lengths = whole_run("both")[-1].cache.tier_len
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


def test_no_layer_merged_is_diffkv():
    policy = dataclasses.replace(POLICIES["both"], pairs=dkv.LayerPairs(start=1.0))
    merged, plain = (make_cache(MODEL, policy, [50], kernels=XLA) for policy in (policy, TIERS))
    assert plain.spec == merged.spec  # the same programs run
    assert jax.tree.structure(plain) == jax.tree.structure(merged)
    assert make_cache(MODEL, POLICIES["both"], [50]).spec != plain.spec


def owners(cache: dkv.KVCache) -> list[set[int]]:
    """Pages of the shallow and of the deep layers."""
    parts = ((x[:FIRST], x[FIRST:]) for x in (cache.page_table, cache.tier_len))
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
        check_pool(cache.spec.layout, cache.page_table, cache.tier_len, cache.ring)
        assert not cache.overflow.any()
    least = max(
        moment.cache.spec.num_pages - int(moment.cache.ring.count) for moment in whole_run("both")
    )
    tight = [moment.cache for moment in follow(empty("both", free=least))]
    for small in tight:
        shallow, deep = owners(small)
        assert (
            not small.overflow.any()
            and not shallow & deep
            and len(shallow | deep) + int(small.ring.count) == least
        )
    assert not differing(small, whole_run("pairs")[-1].cache, DEEP)
    assert any(len(owners(earlier)[0] & deep) > 3 for earlier in tight)
    leak = dataclasses.replace(
        cache, ring=dataclasses.replace(cache.ring, count=cache.ring.count - 1)
    )
    with pytest.raises(AssertionError):
        check_pool(leak.spec.layout, leak.page_table, leak.tier_len, leak.ring)


@pytest.mark.slow
def test_a_pool_that_suffices_is_not_taken_for_a_small_one():
    """The policy runs before the end of a prompt only where its chunk may not find its pages: in
    pairs those of both layers together.
    """
    layout, heads = empty("both").spec.layout, REQUESTS * KV_HEADS
    pair = 2 * layout.pages_for(0, 2) + layout.pages_for(2, 22)  # 24 tokens leave the window
    most = heads * (FIRST * (layout.pages_for(0, CHUNK) + 1) + pair)
    enough, too_few = (
        follow(empty("both", free=free), [((CHUNK, CHUNK), False)])[0].cache.tier_len[:FIRST]
        for free in (most, most - 1)
    )
    assert (enough == [CHUNK - WINDOW, 0, 0]).all() and (too_few[..., 0] < CHUNK - WINDOW).sum() > 6


@pytest.mark.slow
def test_the_report_counts_both_kinds():
    cache = whole_run("both")[-1].cache
    report, layout = dkv.memory_report(cache), cache.spec.layout
    assert report.tier_names == ("K8V4", "K4V2", "shared K8V4")
    used = page_ids_in_use(layout, cache.page_table, cache.tier_len, cache.spec.num_pages)
    assert (
        report.pages.sum()
        == len(used)
        == report.pages[:FIRST, ..., :2].sum() + report.pages[FIRST:, ..., ::2].sum()
    )
    assert report.allocated == report.pool - int(cache.ring.count) * (layout.page_bytes + 4)
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
    ring, pages = cache.ring, cache.pages
    free = jnp.asarray(
        [int(ring.ids[(ring.start + i) % len(ring.ids)]) for i in range(int(ring.count))], jnp.int32
    )
    rubbish = dataclasses.replace(
        pages,
        payload=pages.payload.at[free].set(255),
        meta=pages.meta.at[free].set(jnp.nan),
        significance=pages.significance.at[free].set(jnp.nan),
    )
    return dataclasses.replace(cache, pages=rubbish)


@pytest.mark.slow
def test_dead_pages_are_never_read():
    for clean, rubbish in zip(
        whole_run("both"), follow(empty("both"), change=with_rubbish), strict=True
    ):
        assert not differing(clean.cache, rubbish.cache, range(LAYERS), scores=True)
        np.testing.assert_array_equal(clean.out, rubbish.out)

    def everywhere(cache: dkv.KVCache) -> dkv.KVCache:
        free = dataclasses.replace(cache.ring, count=jnp.int32(cache.spec.num_pages))
        return dataclasses.replace(
            with_rubbish(dataclasses.replace(cache, ring=free)), ring=cache.ring
        )

    assert np.isnan(follow(empty("both"), OPERATIONS[:3], change=everywhere)[-1].out).any()


FULL = ((32, 32), True)


@pytest.mark.slow
def test_a_prompt_without_pages_leaves_no_trace():
    """Without its last page, one of the merged layers', a request gives up and gives back what its
    shallow layers have.
    """
    everything = follow(empty("both", (0.0, 0.0)), [FULL])[0].cache
    needed = everything.spec.num_pages - int(everything.ring.count)
    cache = follow(empty("both", (0.0, 0.0), needed - 1), [FULL])[0].cache
    assert (
        cache.overflow.tolist() == [False, True]
        and cache.seq_len.tolist() == [32, 0]
        and not cache.tier_len[:, 1].any()
    )
    assert int(cache.ring.count) == needed - 1 - needed // 2
    used = page_ids_in_use(
        cache.spec.layout, cache.page_table, cache.tier_len, cache.spec.num_pages
    )
    free = [
        int(cache.ring.ids[(cache.ring.start + i) % cache.spec.num_pages])
        for i in range(int(cache.ring.count))
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
    after, _ = operate(
        dataclasses.replace(cache, ring=dataclasses.replace(cache.ring, count=jnp.int32(0))), rng, 1
    )
    assert (
        after.cache.overflow.all()
        and after.cache.recent_len.tolist() == [WINDOW + FLUSH] * REQUESTS
    )
    for name in ("page_table", "tier_len"):
        np.testing.assert_array_equal(getattr(before.cache, name), getattr(after.cache, name))


def test_a_pool_is_refused_for_what_merged_layers_need():
    """With thresholds shallow heads may do with a page; deep ones hold all."""
    build = partial(
        CacheSpec.build, MODEL.attention, num_requests=1, max_len=4096, num_pages=0, dtype="float32"
    )
    budgets = {
        name: int(str(refused(build(policy=policy), policy)).split("can is ")[1].split()[0])
        for name, policy in POLICIES.items()
    }
    spec = build(policy=POLICIES["both"])
    pairs = KV_HEADS * (2 * spec.layout.pages_for(0, 200) + spec.layout.pages_for(2, 3800))
    fixed = int(
        str(refused(build(policy=POLICIES["both"]), POLICIES["both"], WINDOW))
        .split("can is ")[1]
        .split()[0]
    )
    assert (budgets["both"] - fixed) // spec.layout.page_bytes == pairs + FIRST * KV_HEADS - 1
    assert budgets["tiers"] < budgets["both"] < budgets["pairs"]


def refused(
    spec: CacheSpec, policy: dkv.CompressionPolicy, total: int = 4000 + WINDOW
) -> ValueError:
    with pytest.raises(ValueError, match="smallest budget") as error:
        with_pool(spec, policy, [total], [total], 1000)
    return error.value


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        dkv.key_norm(0.5, window=16, whole_layers=(1,), tiers=("K8V4",)),
        pytest.param(dkv.ada_kv(dkv.snapkv(0.4, window=16)), marks=pytest.mark.long),
        pytest.param(dkv.expected_attention(0.5, window=16), marks=pytest.mark.long),
        pytest.param(dkv.h2o("340KiB", window=16), marks=pytest.mark.long),
    ],
    ids=["key norm", "Ada-KV", "expected", "bytes"],
)
def test_budgets_are_for_shallow_layers(policy):
    """Of a model with weights, whose layers see the same up to the first merged one."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32, layers=4)
    prompts, caches = np.random.default_rng(5).integers(0, 97, (1, 200)), []
    for pairs in (dkv.LayerPairs(), None):
        if policy.keep.in_bytes and caches:
            # what that memory comes to
            keep = dkv.Budget(keep=int(caches[0].policy.keep.keep[0, 0, 0]))
            policy = dataclasses.replace(policy, keep=keep)
        cache = make_cache(model, dataclasses.replace(policy, pairs=pairs), [210], kernels=XLA)
        _, cache = prefill(model, params, cache, prompts, np.array([200]), 256)
        check_pool(cache.spec.layout, cache.page_table, cache.tier_len, cache.ring)
        assert not np.asarray(cache.overflow).any()
        caches.append(cache)
    merged, alone = caches
    for layer, head in np.ndindex(4, 2):
        kept = len(held_tokens(merged, layer, 0, head))
        if layer < 2:
            assert stored(merged, layer, 0, head, True) == stored(alone, layer, 0, head, True)
            assert kept <= 150 or layer in policy.keep.whole_layers
        else:
            assert kept == 200 and len(held_tokens(alone, layer, 0, head)) <= 150


def test_it_is_data():
    policy = POLICIES["both"]
    assert dkv.CompressionPolicy.from_json(policy.to_json()) == policy != TIERS
    recipe = dkv.load_policy("diffkv_minicache")
    assert recipe == dataclasses.replace(
        dkv.diffkv(1.0, 0.02), name=recipe.name, pairs=dkv.LayerPairs()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"score": PivotalContext(queries=64), "keep": dkv.Budget()},
            "and PivotalContext.*: merged layers hold all tokens",
        ),
        (
            {"score": AttentionSum(queries=64, reduce="mean"), "keep": HeadClasses(recover=0.9)},
            "and HeadClasses.*: merged layers hold all tokens",
        ),
        (
            {"score": KeyNorm(), "keep": dkv.Budget(layers="pyramid")},
            "budgets would be spread over them",
        ),
        (
            {
                "tiers": ("K8V4", "K8v4V8v4"),
                "score": MeanAttention(queries=64),
                "keep": dkv.Thresholds(),
            },
            "learns them",
        ),
    ],
)
def test_choices_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        dkv.CompressionPolicy(**{"name": "x", "pairs": dkv.LayerPairs()} | changes)
