"""DiffKV's tiers with MiniCache's pairs: budgets, the pools they need, and what cannot work."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from layers_without_weights import FIRST, KV_HEADS, MODEL, WINDOW
from tiers_and_pairs import POLICIES, TIERS, stored

import diffkv_jax as dkv
from diffkv_jax.cache.pool_size import with_pool
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.make_cache import make_cache
from diffkv_jax.methods.diffkv import MeanAttention
from diffkv_jax.methods.fastgen import HeadClasses
from diffkv_jax.methods.h2o import AttentionSum
from diffkv_jax.methods.key_norm import KeyNorm
from diffkv_jax.methods.pyramidinfer import PivotalContext
from diffkv_jax.pallas_kernels.dispatch import XLA
from diffkv_jax.read_prompts import prefill
from diffkv_jax.testing.readback import check_pool, held_tokens
from diffkv_jax.testing.tiny import tiny_model


def test_no_layer_merged_is_diffkv():
    policy = dataclasses.replace(POLICIES["both"], pairs=dkv.LayerPairs(start=1.0))
    merged, plain = (make_cache(MODEL, policy, [50], kernels=XLA) for policy in (policy, TIERS))
    assert plain.spec == merged.spec  # the same programs run
    assert jax.tree.structure(plain) == jax.tree.structure(merged)
    assert make_cache(MODEL, POLICIES["both"], [50]).spec != plain.spec


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
        check_pool(
            cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring
        )
        assert not np.asarray(cache.counters.overflow).any()
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
            "or learn them",
        ),
    ],
)
def test_choices_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        dkv.CompressionPolicy(**{"name": "x", "pairs": dkv.LayerPairs()} | changes)
