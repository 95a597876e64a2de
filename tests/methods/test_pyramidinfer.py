"""PyramidInfer: one set of tokens a layer, nested over depth, chosen while the prompt is read;
against NumPy.
"""

import dataclasses

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.make_cache import make_cache
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.policy.spread import cosine
from diffkv_jax.read_prompts import prefill
from diffkv_jax.testing.readback import check_pool, held_tokens
from diffkv_jax.testing.tiny import tiny_model
from oracles.pyramidinfer import read

LAYERS, LENGTHS = 4, (100, 61)
PROMPTS = [np.random.default_rng(seed).integers(0, 97, n) for seed, n in enumerate(LENGTHS)]
POLICY = dkv.pyramidinfer(0.5, window=16)
native = pytest.param(
    "cpu", marks=pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
)


def model_of():
    return tiny_model(q_heads=4, kv_heads=2, head_dim=32, layers=LAYERS, sharpness=12.0)


def prefilled(
    policy: dkv.CompressionPolicy, chunk: int, implementation: str = "xla"
) -> tuple[np.ndarray, dkv.KVCache]:
    """Logits of the last token of both prompts, and the cache."""
    model, params = model_of()
    batch = np.zeros((2, max(LENGTHS)), np.int32)
    for row, prompt in enumerate(PROMPTS):
        batch[row, : len(prompt)] = prompt
    cache = make_cache(
        model, policy, LENGTHS, cache_dtype="float32", kernels=Kernels(implementation)
    )
    logits, cache = prefill(model, params, cache, batch, np.array(LENGTHS), chunk)
    return np.asarray(logits), cache


def kept(cache: dkv.KVCache, row: int) -> list[set[int]]:
    """What each layer holds of a request, the same in both heads."""
    heads = [
        [set(held_tokens(cache, layer, row, head)) for layer in range(LAYERS)] for head in range(2)
    ]
    assert heads[0] == heads[1]
    return heads[0]


def expected(row: int, **changes) -> tuple[list[set[int]], np.ndarray]:
    budgets = [int(LENGTHS[row] * 0.5 * factor + 1e-3) for factor in cosine(LAYERS, 0.5)]
    return read(
        model_of()[1],
        PROMPTS[row],
        4,
        2,
        budgets,
        **({"window": 16, "sinks": 4, "newest": 1.2} | changes),
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", native])
def test_layers_keep_what_the_paper_says(implementation):
    logits, cache = prefilled(POLICY, 128, implementation)
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)
    for row in range(2):
        sets, last = expected(row)
        assert kept(cache, row) == sets
        assert (
            all(deep <= shallow for shallow, deep in zip(sets, sets[1:], strict=False))
            and sets[-1] < sets[0]
        )
        np.testing.assert_allclose(logits[row], last, atol=2e-4)
    without, last = expected(0, nested=False)  # the comparisons can fail
    assert without[0] == kept(cache, 0)[0] and without[1:] != kept(cache, 0)[1:]
    assert np.abs(logits[0] - last).max() > 0.01
    assert expected(0, newest=4.0)[0] != kept(cache, 0)


@pytest.mark.slow
def test_without_nesting_every_layer_attends_to_all():
    """In chunks too: the stored tokens' scores are averaged over the heads as the chunk's are."""
    logits, cache = prefilled(with_score(nested=False), 32)
    for row in range(2):
        sets, last = expected(row, nested=False)
        assert kept(cache, row) == sets
        np.testing.assert_allclose(logits[row], last, atol=2e-4)


@pytest.mark.slow
@pytest.mark.long
def test_of_several_chunks_the_last_one_nests():
    _, cache = prefilled(POLICY, 32)
    assert cache.in_chunk.present is None
    sets = kept(cache, 0)
    assert [len(held) for held in sets] == [len(held) for held in expected(0)[0]]
    last = [{at for at in held if at >= 68} for held in sets]
    assert all(deep <= shallow for shallow, deep in zip(last, last[1:], strict=False))
    out = dkv.generate(*model_of(), [[3, 4, 5]] * 2, cache=cache, max_new_tokens=1)
    assert out.finish_reason == ("length", "length")


def test_cosine_budgets():
    """The schedule of the paper is their shape: with its own mean they are it."""
    rho = [0.1 * (np.cos(np.pi * layer / 30) + 1) / 2 + 0.9 for layer in range(30)]
    kept_of_all = [float(np.prod(rho[: layer + 1])) for layer in range(30)]
    mean = float(np.mean(kept_of_all))
    assert cosine(30, mean)[-1] < 0.35 < 1.4 < cosine(30, mean)[0]
    np.testing.assert_allclose(mean * cosine(30, mean), kept_of_all)
    np.testing.assert_allclose(cosine(30, 0.3), cosine(30, None))
    flat = cosine(30, 0.9)
    assert abs(flat.mean() - 1) < 1e-9 and abs(0.9 * flat[0] - 1) < 1e-9
    np.testing.assert_array_equal(cosine(1, 0.5), [1.0])
    bound = dkv.pyramidinfer(0.25).bind(30, 2, 3).keep.keep
    np.testing.assert_allclose(bound[:, 1, 2], 0.25 * np.array(kept_of_all) / mean, rtol=1e-6)


def with_score(**changes) -> dkv.CompressionPolicy:
    return dataclasses.replace(POLICY, score=dataclasses.replace(POLICY.score, **changes))


def with_budget(**changes) -> dkv.CompressionPolicy:
    return dataclasses.replace(POLICY, keep=dataclasses.replace(POLICY.keep, **changes))


@pytest.mark.parametrize(
    ("change", "changes", "message"),
    [
        (with_score, {"newest_weight": 0.0}, "finite number above 0"),
        (with_budget, {"whole_layers": (1,)}, "cannot keep what layers before them drop"),
        (with_budget, {"share_heads": 0.2}, "as much in every head"),
        (with_budget, {"keep": (0.5, 0.4)}, "as much in every head"),
        (with_budget, {"layers": "sine"}, "'pyramid' or 'cosine'"),
    ],
)
def test_choices_that_cannot_work(change, changes, message):
    with pytest.raises(ValueError, match=message):
        change(**changes)


def test_sliding_windows_would_see_dropped_tokens():
    model, _ = tiny_model(windows=(None, 24), layers=2)
    with pytest.raises(ValueError, match="without sliding-window layers"):
        make_cache(model, POLICY, [100])


def test_the_policy_is_data():
    policy = dkv.load_policy("pyramidinfer")
    assert (
        dkv.CompressionPolicy.from_json(policy.to_json()) == policy
        and policy.score.nested
        and policy.keep.layers == "cosine"
    )
