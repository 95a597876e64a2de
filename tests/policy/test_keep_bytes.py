"""Budgets in bytes: the whole cache stays within them and nearly fills them, however the tokens are
spread.
"""

import dataclasses

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.methods.key_norm import KeyNorm
from diffkv_jax.testing.readback import check_pool
from diffkv_jax.testing.tiny import tiny_model

PROMPTS = np.random.default_rng(5).integers(0, 97, (2, 600))
OPTIONS = {"window": 16, "flush": 8}


def cache_of(policy: dkv.CompressionPolicy) -> dkv.KVCache:
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    out = dkv.generate(model, params, PROMPTS, policy=policy, max_new_tokens=20, prefill_chunk=256)
    assert out.finish_reason == ("length", "length")
    check_pool(
        out.cache.spec.layout,
        out.cache.stored.page_table,
        out.cache.stored.tier_len,
        out.cache.stored.ring,
    )
    return out.cache


def pyramid(keep: str) -> dkv.CompressionPolicy:
    policy, budget = dkv.key_norm(keep, **OPTIONS), dkv.Budget(keep=keep, layers="pyramid")
    return dataclasses.replace(policy, keep=budget)


POLICIES = {
    "exact": dkv.h2o("400KiB", **OPTIONS),
    "four bits": dkv.key_norm("200KiB", tiers=("K4V4",), whole_layers=(), **OPTIONS),
    "pyramid": pyramid("400KiB"),
}


@pytest.mark.daily(5)
@pytest.mark.parametrize("name", POLICIES)
def test_the_cache_is_as_large_as_said(name):
    policy = POLICIES[name]
    cache, said = cache_of(policy), int(policy.keep.keep.removesuffix("KiB")) * 1024
    report = dkv.memory_report(cache)
    assert 0.9 * said < report.pool <= said
    held = report.tokens.sum(axis=(0, 3))  # [requests, heads]
    assert report.dropped.min() >= 0 and held.min() > 2 * (16 + 4)
    assert report.allocated > 0.85 * said


@pytest.mark.slow
@pytest.mark.long
def test_more_bytes_hold_more_tokens():
    tokens = [
        int(cache_of(dkv.h2o(keep, **OPTIONS)).policy.keep.keep[0, 0, 0])
        for keep in ("300KiB", "450KiB")
    ]
    assert 80 < tokens[0] < tokens[1] - 60
    # everything
    assert int(cache_of(dkv.h2o("1GiB", **OPTIONS)).policy.keep.keep[0, 0, 0]) >= 619


@pytest.mark.slow
def test_the_number_is_for_all_that_may_come():
    """Room for the whole cache: a short first turn does not set it, nor a short neighbour, nor the
    mean of a pyramid.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    run = {"max_new_tokens": 20, "prefill_chunk": 256}
    first = dkv.generate(
        model,
        params,
        [PROMPTS[0, :60], PROMPTS[1, :300]],
        policy=POLICIES["exact"],
        max_len=640,
        **run,
    )
    second = dkv.generate(
        model, params, [PROMPTS[0, :500], PROMPTS[1, :200]], cache=first.cache, **run
    )
    assert second.finish_reason == ("length", "length")
    report = dkv.memory_report(second.cache)
    assert report.pool <= 400 * 1024 and report.tokens.sum(axis=(0, 3)).min() > 150
    cache = dkv.make_cache(model, pyramid("64MiB"), [620])
    assert np.asarray(cache.policy.keep.keep).min() >= 620
    wide = dkv.make_cache(model, dkv.h2o("64MiB", window=1200), [620])
    assert np.asarray(wide.policy.keep.keep).min() >= 1200


def test_what_cannot_work():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    with pytest.raises(
        ValueError,
        match=r"keep='20KiB' is too little: the smallest cache of "
        r"policy 'h2o' takes \d+ bytes",
    ):
        dkv.generate(model, params, PROMPTS, policy=dkv.h2o("20KiB"), max_new_tokens=1)
    with pytest.raises(ValueError, match="is a memory budget already"):
        dkv.generate(
            model, params, PROMPTS, policy=dkv.h2o("1MiB"), memory_budget="2MiB", max_new_tokens=1
        )
    with pytest.raises(ValueError, match="'5 parsecs' must be a number of bytes"):
        dkv.h2o("5 parsecs")
    with pytest.raises(ValueError, match="generated later all stay"):
        dkv.snapkv("1MiB")
    with pytest.raises(ValueError, match="trade pages"):
        dkv.ada_kv(dkv.h2o("1MiB"))
    with pytest.raises(ValueError, match="are two"):
        dkv.CompressionPolicy(
            "x",
            tiers=("K8V4", "K4V2"),
            score=KeyNorm(),
            keep=dkv.Budget(keep="1MiB", keep_high=0.1),
        )
    policy = dkv.h2o("1MiB")
    assert dkv.CompressionPolicy.from_json(policy.to_json()) == policy
    assert dataclasses.replace(policy, keep=dkv.Budget(keep=0.5)) == dkv.h2o(0.5)
