"""Bad input ends in a ValueError that names it, before anything is computed; policies as JSON."""

import importlib
import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax import CompressionPolicy, Sample
from diffkv_jax.testing.tiny import prompt, tiny_model

NONE = CompressionPolicy.none()


@pytest.fixture(scope="module")
def model():
    return tiny_model(max_len=512)


@pytest.fixture
def generate(model, monkeypatch):
    """`generate` on the tiny model, with a prefill that fails: errors must come first."""

    def computed(*_):
        raise AssertionError("something was computed before the input was checked")

    monkeypatch.setattr(importlib.import_module("diffkv_jax.generate"), "read_prompts", computed)
    return partial(dkv.generate, *model)


def test_the_guard_sees_a_call_without_fault(generate):
    with pytest.raises(AssertionError, match="was computed"):
        generate([[1, 2, 3]], max_new_tokens=1)


PROMPTS = {
    "longer than the context": (
        [prompt(513)],
        "request 0 may come to 513 tokens.*model's context of 512",
    ),
    "no request": ([], "at least one request"),
    "no request, array": (np.zeros((0, 4), np.int32), "at least one request"),
    "one dimension": (np.zeros(4, np.int32), r"\[requests, length\]"),
    "empty prompt": ([[1, 2], []], "prompt 1 has length 0.*empty prompt"),
    "empty prompt, array": (np.zeros((1, 0), np.int32), "prompt 0 has length 0"),
    "negative id": (
        [[1, 2], [3, -1]],
        r"prompt 1 holds token id -1, outside the vocabulary \[0, "
        r"97\)",
    ),
    "id past the vocabulary": ([[1, 97]], "prompt 0 holds token id 97"),
    "float tokens": ([[1.0, 2.0]], "integers, given dtype float64"),
    "float array": (np.zeros((1, 4), np.float32), "integers, given dtype float32"),
    "a single prompt": ([1, 2, 3], "wrap a single prompt in a list"),
    "nested prompts": ([[[1, 2]], [[3]]], "each a flat list of token ids"),
    "booleans": (np.zeros((1, 4), bool), "integers, given dtype bool"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(generate, case):
    tokens, message = PROMPTS[case]
    with pytest.raises(ValueError, match=message):
        generate(tokens, max_new_tokens=1)


ARGUMENTS = {
    "context with new tokens": (
        {"tokens": [prompt(500)], "max_new_tokens": 14},
        "may come to 513 tokens.*context of 512.*max_new_tokens",
    ),
    "max_len": ({"max_len": 40, "max_new_tokens": 10}, "may come to 49 tokens.*max_len=40"),
    "negative max_len": ({"max_len": -1}, "max_len=-1"),
    "negative new tokens": ({"max_new_tokens": -3}, "max_new_tokens=-3"),
    "chunk 48": ({"prefill_chunk": 48}, "prefill_chunk=48 must be a power of two"),
    "chunk 8": ({"prefill_chunk": 8}, "power of two of at least 16"),
    "chunk 0": ({"prefill_chunk": 0}, "prefill_chunk=0"),
    "chunk below queries": (
        {"tokens": [prompt(100)], "prefill_chunk": 32, "policy": dkv.diffkv()},
        "prefill_chunk=32.*queries=64",
    ),
    "Sample without key": ({"sampling": Sample()}, "needs key="),
    "raw key": ({"sampling": Sample(), "key": jnp.zeros(3, jnp.uint32)}, "key=.* must be a seed"),
    "too many keys": (
        {"sampling": Sample(), "key": jax.random.split(jax.random.key(0), 3)},
        "for each of the 1 requests",
    ),
    "budget zero": ({"memory_budget": 0}, "memory_budget=0 must be more than zero"),
    "budget zero, text": ({"memory_budget": "0MiB"}, "more than zero"),
    "budget negative": ({"memory_budget": -5}, "memory_budget=-5 must be a number of bytes"),
    "budget negative, text": ({"memory_budget": "-5MiB"}, "number of bytes or text"),
    "budget unit": (
        {"memory_budget": "5 parsecs"},
        "'5 parsecs' must be a number of bytes or text",
    ),
    "budget dots": ({"memory_budget": "1.2.3GiB"}, "number of bytes or text"),
    "budget too small": (
        {"memory_budget": "1KiB"},
        "cannot hold.*smallest budget that can is .*raise the budget",
    ),
    "thresholds do not broadcast": (
        {"policy": dkv.diffkv((1.0, 1.0, 1.0))},
        r"must broadcast to .*kv_heads\] = \(2, 1, 1\)",
    ),
    "lengths count": (
        {"tokens": np.zeros((1, 8), np.int32), "lengths": [4, 4]},
        "one entry for each of the 1 requests",
    ),
    "length past the row": (
        {"tokens": np.zeros((1, 8), np.int32), "lengths": [9]},
        "prompt 0 has length 9",
    ),
    "length zero": (
        {"tokens": np.zeros((1, 8), np.int32), "lengths": [0]},
        "prompt 0 has length 0",
    ),
    "cache dtype": ({"cache_dtype": "float8"}, "dtype='float8' must be"),
    "cache dtype of the window": (
        {"cache_dtype": "int8", "policy": dkv.diffkv()},
        "dtype='int8' must be",
    ),
    "max_len zero": ({"max_len": 0}, "max_len=0 must be an integer of at least 1"),
    "tiers of rising payload": (
        {"policy": dkv.diffkv(tiers=("K2V2:32,32", "K8V2"))},
        "a lower tier must not take more",
    ),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(generate, case):
    arguments, message = ARGUMENTS[case]
    arguments = {"tokens": [prompt(40)], "max_new_tokens": 1} | arguments
    with pytest.raises(ValueError, match=message):
        generate(arguments.pop("tokens"), **arguments)


def test_budget_of_only_a_dot(generate):
    with pytest.raises(ValueError, match="memory_budget='.GiB' must be a number of bytes"):
        generate([prompt(40)], memory_budget=".GiB")


POLICIES = {
    "negative": ({"alpha_high": -1.0}, "alpha_high=-1.0 must be finite and not negative"),
    "negative low": ({"alpha_low": -0.1}, "alpha_low=-0.1 must be"),
    "NaN": ({"alpha_high": float("nan")}, "alpha_high=nan must be finite"),
    "NaN in a tuple": ({"alpha_low": (0.0, float("nan"))}, "alpha_low=.* must be finite"),
    "infinite": ({"alpha_high": float("inf")}, "alpha_high=inf must be finite"),
    "low above high": (
        {"alpha_high": 0.5, "alpha_low": 0.6},
        "alpha_low=0.6 must not exceed alpha_high=0.5",
    ),
    "low above high at one head": ({"alpha_high": 0.5, "alpha_low": (0.1, 0.6)}, "must not exceed"),
    "single tier, two alphas": (
        {"tiers": ("K8V4",), "alpha_high": 1.0, "alpha_low": 0.1},
        "must equal alpha_low=0.1 with the single tier",
    ),
    "tiers reversed": ({"tiers": ("K4V2", "K8V4")}, "K8V4 is not smaller than K4V2"),
    "tiers equal": ({"tiers": ("K8V4", "K8V4")}, "K8V4 is not smaller than K8V4"),
    "three tiers": ({"tiers": ("K8V8", "K8V4", "K4V2")}, "one or two formats"),
    "no tier": ({"tiers": ()}, "one or two formats"),
    "unknown format": ({"tiers": ("bf16", "K4V2")}, "format 'bf16' must be 'full' or"),
    "unknown bits": ({"tiers": ("K7V4", "K4V2")}, "bits=7 must be one of"),
    "window 0": ({"window": 0}, "window=0 must be an integer of at least 1"),
    "flush 0": ({"flush": 0}, "flush=0 must be an integer of at least 1"),
    "flush not whole": ({"flush": 1.5}, "flush=1.5"),
    "queries 0": ({"queries": 0}, "queries=0: MeanAttention needs queries=64"),
    "queries -1": ({"queries": -1}, "queries=-1 must be a number of queries"),
    "queries a word": ({"queries": "some"}, "queries='some' must be"),
    "no queries": ({"queries": None}, "queries=None must be a number of queries"),
}


@pytest.mark.parametrize("case", POLICIES)
def test_policies(case):
    arguments, message = POLICIES[case]
    with pytest.raises(ValueError, match=message):
        dkv.diffkv(**arguments)


def test_single_tier_with_different_alphas_at_one_head():
    with pytest.raises(ValueError, match="single tier"):
        dkv.diffkv((1.0, 0.5), (1.0, 0.1), tiers=("K8V4",))


SAMPLING = [
    ("temperature", 0.0), ("temperature", -1.0), ("temperature", float("inf")),
    ("temperature", float("nan")),
    ("top_k", 0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5), ("top_p", float("nan")),
    ("min_p", 0.0), ("min_p", -0.1), ("min_p", 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), SAMPLING)
def test_sampling(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Sample(**{field: value})


def test_continuing(model, generate):
    cache = dkv.make_cache(model[0], NONE, [64, 64], max_len=64)
    two = [[1, 2], [3]]
    with pytest.raises(ValueError, match="policy beside cache=: a cache keeps what the call"):
        generate(two, cache=cache, policy=NONE)
    with pytest.raises(ValueError, match="memory_budget and max_len and cache_dtype beside"):
        generate(two, cache=cache, memory_budget="1MiB", max_len=64, cache_dtype="bfloat16")
    with pytest.raises(TypeError, match=r"arguments \['polcy'\]; did you mean 'policy'"):
        generate(two, polcy=NONE)
    with pytest.raises(ValueError, match="made for another model"):
        generate(two, cache=dkv.make_cache(tiny_model(kv_heads=3)[0], NONE, [64, 64], max_len=64))
    with pytest.raises(ValueError, match="the pool of . pages cannot hold"):
        generate(
            [prompt(40), prompt(50)],
            max_new_tokens=1,
            cache=dkv.make_cache(
                model[0], dkv.quantized("K4V4", window=8), [8, 8], memory_budget="84KiB"
            ),
        )
    with pytest.raises(ValueError, match="the cache holds 2 requests, given 3 prompts"):
        generate([*two, [4]], cache=cache)
    with pytest.raises(
        ValueError, match="request 0 may come to 65 tokens, more than the cache's max_len=64"
    ):
        generate([prompt(56), [1]], cache=cache, max_new_tokens=10)
    assert not any(x.is_deleted() for x in jax.tree.leaves(cache)), (
        "a refused call must not take the cache's memory"
    )


@pytest.mark.slow
def test_smallest_budget_in_the_message_is_enough(model):
    tokens, sizes = [prompt(200, 1), prompt(90, 2)], {"max_new_tokens": 2, "prefill_chunk": 64}
    with pytest.raises(ValueError) as error:
        dkv.generate(*model, tokens, policy=NONE, memory_budget="1KiB", **sizes)
    least = int(re.search(r"smallest budget that can is (\d+) bytes", str(error.value))[1])
    with pytest.raises(ValueError, match=f"is {least} bytes"):
        dkv.generate(*model, tokens, policy=NONE, memory_budget=least - 1, **sizes)
    out = dkv.generate(*model, tokens, policy=NONE, memory_budget=least, **sizes)
    assert out.finish_reason == ("length", "length")
    assert sum(x.nbytes for x in jax.tree.leaves(out.cache)) <= least


@pytest.mark.slow
def test_units_of_the_budget():
    def pool(budget):
        return dkv.make_cache(
            tiny_model(max_len=32_768)[0], dkv.diffkv(1.0, 0.02), [20_000], memory_budget=budget
        ).spec.num_pages

    assert pool("512KiB") == pool(2**19) == pool(str(2**19)) == pool(" 0.5 mib ")
    assert pool("512kB") == pool(512_000) < pool("512KiB")


NESTED = (((0.5, 1.0),), ((0.25, 2.0),))


@pytest.mark.parametrize(
    "policy",
    [
        NONE,
        dkv.quantized("K4V2:2,4"),
        dkv.diffkv(NESTED, 0.1, queries="all", flush=1),
        dkv.diffkv(1.0, 0.02),
    ],
)
def test_policy_as_json(policy, tmp_path):
    again = CompressionPolicy.from_json(policy.to_json())
    assert again == policy and hash(again) == hash(policy) and repr(again) == repr(policy)
    assert policy.name in repr(policy) and {policy: 1}[again] == 1
    (tmp_path / "policy.json").write_text(policy.to_json())
    assert dkv.load_policy(tmp_path / "policy.json") == policy
    jax.tree.map(np.testing.assert_array_equal, again.bind(2, 1, 2), policy.bind(2, 1, 2))


@pytest.mark.parametrize(
    "choices",
    [
        {"tiers": ("K8V4", "K4V2"), "keep": dkv.Thresholds()},
        {"tiers": ("K8V4",), "keep": dkv.Thresholds(alpha_high=1.0, alpha_low=1.0)},
    ],
)
def test_thresholds_need_a_score(choices):
    with pytest.raises(ValueError, match="thresholds need scores|a second tier needs scores"):
        CompressionPolicy("x", **choices)


OLD = {"name": "x", "tiers": ["K8V4", "K4V2"], "alpha_high": 1.0, "observe": 64, "window": 64}


def test_policies_of_the_first_version_are_refused():
    """With where each of their fields has gone."""
    for old in (OLD, {"version": 1} | OLD, {"tiers": ["full"], "score": "window", "keep": 0.5}):
        with pytest.raises(ValueError, match="flat fields of version 1 .*write each stage"):
            CompressionPolicy.from_json(json.dumps(old))
    with pytest.raises(ValueError, match="alpha_high -> keep: Thresholds"):
        CompressionPolicy.from_mapping(OLD)
    with pytest.raises(ValueError, match="version=3 must be 2"):
        CompressionPolicy.from_mapping({"version": 3, "name": "x"})


def test_policies_differ():
    assert dkv.diffkv(1.0, 0.0) != dkv.diffkv(1.0, 0.02)
    assert dkv.diffkv(np.array([1.0, 2.0])) == dkv.diffkv([1.0, 2.0]) == dkv.diffkv((1.0, 2.0))


JSON = {
    "unknown field": (NONE.to_json().replace("tiers", "tier"), "any of"),
    "missing name": ('{"tiers": ["full"]}', "missing 'name'"),
    "unknown field of a stage": (
        NONE.to_json().replace("window", "windows"),
        r"schedule: Schedule has fields .*'window'.*, not \['windows'\]; did you mean 'window'",
    ),
    "bad value": (NONE.to_json().replace('"window": 64', '"window": 0'), "window=0"),
    "a list": ("[1, 2]", "must be a JSON object"),
    "no JSON": ("tiers: full", "Expecting value"),
}


@pytest.mark.parametrize("case", JSON)
def test_json(case):
    text, message = JSON[case]
    with pytest.raises(ValueError, match=message):
        CompressionPolicy.from_json(text)


def test_json_of_a_number():
    with pytest.raises(ValueError, match="must be a JSON object"):
        CompressionPolicy.from_json("5")


def test_json_with_tiers_of_a_wrong_type():
    with pytest.raises(ValueError, match="tiers"):
        CompressionPolicy.from_json('{"name": "x", "tiers": 5}')


def test_load_policy_of_a_missing_file(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"must be one of \[.*'diffkv', .*'snapkv'.*\] or a JSON "
        r"file; no such file",
    ):
        dkv.load_policy(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no such file"):
        dkv.load_policy("tiny")
