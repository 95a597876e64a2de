"""KVzip's pages: what is freed and what stays, tiers, the smallest budget, and too few pages."""

import re
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvzip_of_kvpress import HEADS, kvzip
from tiny_llama import LENGTH, PROMPT, models

import diffkv_jax as dkv
from diffkv_jax.make_cache import make_cache
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native import build
from diffkv_jax.read_prompts import prefill
from diffkv_jax.steps.jitted import end_passes
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.readback import check_pool, held_tokens
from diffkv_jax.testing.tiny import tiny_model


@pytest.mark.slow
def test_keeping_everything_changes_nothing():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policies = dkv.CompressionPolicy.none(window=16, flush=4), kvzip(1.0, 32, 16, flush=4)
    outs = [
        dkv.generate(model, params, PROMPT[None, :80], policy=policy, max_new_tokens=6)
        for policy in policies
    ]
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    plain, method = (
        {
            at: (k.tobytes(), v.tobytes())
            for at, (_, k, v, _) in held_tokens(out.cache, 1, 0, 1).items()
        }
        for out in outs
    )
    assert plain == method
    assert outs[0].cache.stored.pages.significance is None


@pytest.mark.slow
def test_pages_are_freed_and_later_tokens_stay():
    """Eight bits; a batch of two lengths, decode, and a second turn of which nothing is dropped."""
    model, params = tiny_model(
        q_heads=4, kv_heads=2, head_dim=32, windows=(None, 24, None), layers=3
    )
    prompts, run = [PROMPT, PROMPT[:170]], {"max_new_tokens": 11, "prefill_chunk": 64}

    def turns(prompts, keep):
        policy = kvzip(keep, 128, 16, tiers=("K8V4",), flush=8)
        first = dkv.generate(model, params, prompts, policy=policy, max_len=384, **run)
        report = dkv.memory_report(first.cache)
        second = dkv.generate(
            model, params, [prompt[:30] for prompt in prompts], cache=first.cache, **run
        )
        check_pool(
            second.cache.spec.layout,
            second.cache.stored.page_table,
            second.cache.stored.tier_len,
            second.cache.stored.ring,
        )
        return np.concatenate([first.tokens, second.tokens], axis=1), second.cache, report

    tokens, cache, report = turns(prompts, 0.25)
    assert report.pages.sum() < 0.45 * turns(prompts, 1.0)[2].pages.sum()
    alone, its_cache, _ = turns(prompts[1:], 0.25)
    np.testing.assert_array_equal(tokens[1], alone[0])
    for row, length in enumerate((LENGTH, 170)):
        held = [
            set(held_tokens(cache, layer, row, head)) for layer in range(2) for head in range(2)
        ]
        assert all(
            {0, 1, 2, 3, *range(length - 16, length + 51)} <= positions for positions in held
        )
        assert sum(map(len, held)) == 4 * (length // 4 + 51)
    assert [
        set(held_tokens(its_cache, layer, 0, head)) for layer in range(2) for head in range(2)
    ] == held


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation",
    [
        "xla",
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(
                bool(build.why_unavailable()), reason="native kernels cannot be built here"
            ),
        ),
    ],
)
def test_two_tiers(implementation):
    """The best stay at eight bits, the next at four; a tier's line is one for all heads."""
    policy = kvzip(0.5, tiers=("K8V4", "K4V2"), keep_high=0.2)
    _, model, params = models(2)
    cache = make_cache(model, policy, [LENGTH], kernels=Kernels(implementation))
    _, cache = prefill(model, params, cache, PROMPT[None], np.array([LENGTH]), 128)
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)
    tiers = {"high": [], "low": [], "recent": []}
    for layer, head in HEADS:
        for tier, _, _, score in held_tokens(cache, layer, 0, head).values():
            tiers[tier].append(score)
    assert [len(tiers[name]) for name in tiers] == [59 * 8, 90 * 8, 8]
    assert min(tiers["high"]) >= max(tiers["low"])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("tiers", [("K8V4",), ("K8V4", "K4V2")], ids=str)
def test_the_smallest_budget_is_enough(tiers):
    """It holds the whole prompts; what they leave takes a second turn in, which their own tokens
    would have no room for beside it.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policy = kvzip(0.3, 128, 16, tiers=tiers, keep_high=0.1 if len(tiers) == 2 else None, flush=8)
    run = partial(
        dkv.generate,
        model,
        params,
        [PROMPT, PROMPT[:170]],
        policy=policy,
        max_new_tokens=9,
        prefill_chunk=64,
        max_len=600,
    )
    with pytest.raises(ValueError, match="the smallest budget") as told:
        run(memory_budget="100kB")
    out, free = run(memory_budget=int(re.findall(r"is (\d+) bytes", str(told.value))[0])), run()
    np.testing.assert_array_equal(out.tokens, free.tokens)
    assert (
        out.cache.spec.num_pages < 0.6 * free.cache.spec.num_pages
        and out.finish_reason == ("length",) * 2
    )
    more = dkv.generate(
        model,
        params,
        [PROMPT[:120], PROMPT[:60]],
        cache=out.cache,
        max_new_tokens=9,
        prefill_chunk=64,
    )
    assert more.finish_reason == ("length",) * 2
    check_pool(
        more.cache.spec.layout,
        more.cache.stored.page_table,
        more.cache.stored.tier_len,
        more.cache.stored.ring,
    )


@pytest.mark.slow
def test_a_request_for_which_there_is_no_page_is_emptied(monkeypatch):
    """Full pages of one tier become parts of pages of two."""
    _, model, params = models(2)
    policy = kvzip(1.0, tiers=("K8V4", "K4V2"), keep_high=0.9, window=16)
    monkeypatch.setattr(
        import_module("diffkv_jax.read_prompts"), "end_passes", lambda cache, _: cache
    )
    cache = make_cache(model, policy, [16 + 64], max_len=80)
    assert cache.spec.layout.pages_for(0, 64) * cache.spec.layout.tokens_per_page(0) == 64
    _, cache = prefill(model, params, cache, PROMPT[None, :80], np.array([80]), 128)
    due, starved = np.array([True]), jax.tree.map(jnp.copy, cache)
    starved = with_part(starved, "stored.ring.count", jnp.int32(0))
    starved, cache = end_passes(starved, due), end_passes(cache, due)
    assert not cache.counters.overflow.any() and np.asarray(cache.stored.tier_len[..., 1]).max() > 0
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)
    assert starved.counters.overflow.all() and not np.asarray(starved.stored.tier_len).any()
