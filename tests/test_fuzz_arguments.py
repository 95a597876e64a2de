"""Any value for any argument of policies and small functions: a policy that works, or an error that
names the argument.

DIFFKV_JAX_FUZZ=ci or =hour draws more (`nasty.PROFILES`).
"""

import dataclasses
import inspect
import json
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st

import diffkv_jax as dkv
from diffkv_jax import AttentionSpec, CacheSpec, CompressionPolicy
from diffkv_jax.cache.pool_size import with_pool
from diffkv_jax.methods import METHODS
from diffkv_jax.methods.evicting import Options
from diffkv_jax.methods.recipes import RECIPES
from diffkv_jax.methods.registry import NAMED
from diffkv_jax.units import parse_bytes
from nasty import PROFILE, attempt, fuzz, some_of, values

LAYERS, HEADS, DIM, CONTEXT = 4, 2, 32, 256
ATTENTION = dict(
    num_layers=LAYERS,
    num_q_heads=2 * HEADS,
    num_kv_heads=HEADS,
    head_dim=DIM,
    sliding_windows=(None,) * LAYERS,
    sm_scale=DIM**-0.5,
    logits_soft_cap=None,
    vocab_size=97,
    max_position_embeddings=CONTEXT,
    dtype="float32",
    rope=tuple(1e4 ** (-np.arange(DIM // 2) / (DIM // 2))),
)
SPEC = AttentionSpec(**ATTENTION)
BUILD: dict[str, Any] = dict(num_requests=1, max_len=64, num_pages=0, dtype="float32")
PLAIN = (str, int, float, bool, type(None))
MAKERS = {
    make.__name__: make
    for make in (*METHODS, *RECIPES, dkv.quantized, dkv.ada_kv, CompressionPolicy.none)
}
NEEDED = {"quantized": {"fmt": "K8V4"}, "ada_kv": {"policy": dkv.h2o()}}


def check(policy: CompressionPolicy, names: set[str]) -> None:
    """It is data, and a cache can be made of it, or the error says why not."""
    assert isinstance(policy, CompressionPolicy)
    assert_plain(json.loads(policy.to_json()))
    again = CompressionPolicy.from_json(policy.to_json())
    assert again == policy and hash(again) == hash(policy) and repr(again) == repr(policy)
    assert dkv.load_policy(json.loads(policy.to_json())) == policy
    names = {*names, "policy"}
    in_bytes = isinstance(policy.keep, dkv.Budget) and policy.keep.in_bytes
    bound = None if in_bytes else attempt(lambda: policy.bind(LAYERS, 1, HEADS), names)
    spec = attempt(lambda: CacheSpec.build(SPEC, policy, **BUILD), names)
    if bound is None or spec is None:
        return
    for leaf in jax.tree.leaves(bound):
        assert leaf.shape == (LAYERS, 1, HEADS) and leaf.dtype in (np.float32, np.int32)
        assert np.all(np.isfinite(leaf)) and np.all(leaf >= 0)
    # half of the time that an example takes
    if PROFILE != "quick":
        attempt(lambda: with_pool(spec, policy, [64], [64], "1MiB"), {*names, "memory_budget"})


def assert_plain(value: Any) -> None:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for entry in value:
            assert_plain(entry)
    else:
        assert type(value) in PLAIN, f"{value!r} is {type(value)}"


def arguments_of(make) -> list[str]:
    """Names of the arguments of a function, those of `Options` included."""
    given_ones = inspect.signature(make).parameters.values()
    names = [one.name for one in given_ones if one.kind is not one.VAR_KEYWORD]
    return names + [name for name in Options.__annotations__ if len(names) < len(given_ones)]


@fuzz
@given(
    st.sampled_from(sorted(NAMED)),
    some_of(field.name for field in dataclasses.fields(CompressionPolicy)),
)
def test_fields(name, changes):
    base = NAMED[name]()
    policy = attempt(lambda: dataclasses.replace(base, **changes), changes)
    if policy is not None:
        check(policy, set(changes))


@fuzz
@given(st.data())
def test_methods_and_recipes(data):
    name = data.draw(st.sampled_from(sorted(MAKERS)))
    given_ones = data.draw(some_of(arguments_of(MAKERS[name])))
    policy = attempt(lambda: MAKERS[name](**NEEDED.get(name, {}) | given_ones), given_ones)
    if policy is not None:
        check(policy, set(given_ones))


@fuzz
@given(st.sampled_from([dkv.LayerPairs, dkv.Replay]), st.data())
def test_parts(kind, data):
    changes = data.draw(some_of(field.name for field in dataclasses.fields(kind)))
    part = attempt(lambda: kind(**changes), changes)
    if part is not None:
        assert_plain(dataclasses.asdict(part))
        assert (
            kind(**json.loads(json.dumps(dataclasses.asdict(part)))) == part
            and hash(part) is not None
        )


@fuzz
@given(some_of(ATTENTION))
def test_attention(changes):
    attention = attempt(lambda: AttentionSpec(**ATTENTION | changes), changes)
    if attention is not None:
        assert_plain(dataclasses.asdict(attention))
        assert hash(attention) == hash(dataclasses.replace(attention))
        small = all(
            getattr(attention, name) < 1000 for name in ("num_layers", "num_q_heads", "head_dim")
        )
        for policy in (dkv.diffkv(), dkv.turboquant()) if small else ():
            attempt(lambda policy=policy: CacheSpec.build(attention, policy, **BUILD), changes)


@fuzz
@given(some_of({"attention": 0, "policy": 0, "tokens": 0, "kernels": 0} | BUILD))
def test_specs(changes):
    spec = attempt(
        lambda: CacheSpec.build(**{"attention": SPEC, "policy": dkv.diffkv(), **BUILD, **changes}),
        changes,
    )
    assert spec is None or hash(spec) == hash(dataclasses.replace(spec))


@fuzz
@given(values)
def test_names_and_sources(source):
    policy = attempt(lambda: dkv.load_policy(source), {"policy"})
    if policy is not None:
        check(policy, set())


@fuzz
@given(values)
def test_values_that_are_no_caches_tokenizers_texts_or_amounts(value):
    assert attempt(lambda: dkv.memory_report(value), {"cache"}) is None
    assert attempt(lambda: dkv.token_classes(value), {"tokenizer"}) is None
    assert attempt(lambda: dkv.replay_words(value), {"tokenizer"}) is None
    attempt(lambda: CompressionPolicy.from_json(value), {"text", "policy"})
    amount = attempt(lambda: parse_bytes(value), {"memory_budget"})
    assert amount is None or (type(amount) is int and amount > 0)


@fuzz
@given(some_of(["special", "punctuation"]))
def test_token_classes(changes):
    classes = attempt(
        lambda: dkv.TokenClasses(**{"special": (0,), "punctuation": ()} | changes), changes
    )
    if classes is not None:
        assert_plain(classes)
        check(dkv.fastgen(protect=classes.special), {"protect"})


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["all", "full", 64, 0.5, 1e400]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)
FIELDS = [*sorted(field.name for field in dataclasses.fields(CompressionPolicy)), "window"]


@fuzz
@given(
    st.sampled_from(sorted(NAMED)),
    st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=2),
    st.integers(0, 2000),
)
def test_json(name, changes, cut):
    text = json.dumps(json.loads(NAMED[name]().to_json()) | changes)
    policy = attempt(lambda: CompressionPolicy.from_json(text), changes)
    if policy is not None:
        check(policy, set(changes))
    if cut < len(text):
        assert attempt(lambda: CompressionPolicy.from_json(text[:cut]), {"text"}) is None


OF_STAGES = {
    "keep": "alpha_high|alpha_low|keep_high|share_layers|share_heads|whole_layers|layers|recover",
    "schedule": "window|flush|group",
    "protect": "sinks",
    "transform": "rotary",
}


@fuzz
@given(
    st.sampled_from(sorted(NAMED)),
    st.sampled_from(sorted(NAMED)),
    st.sets(st.sampled_from(FIELDS[:-1]), min_size=1, max_size=2),
)
def test_stages_of_other_policies(name, other, fields):
    """Any stage beside any other: a policy, or an error that names one of those exchanged."""
    given = json.loads(NAMED[other]().to_json())
    text = json.dumps(
        json.loads(NAMED[name]().to_json()) | {field: given[field] for field in fields}
    )
    said = {part for field in fields for part in OF_STAGES.get(field, field).split("|")}
    policy = attempt(lambda: CompressionPolicy.from_json(text), said | fields)
    if policy is not None:
        check(policy, said | fields)


@fuzz
@given(st.binary(max_size=40))
def test_files(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("policies") / "policy.json"
    path.write_bytes(content)
    assert attempt(lambda: dkv.load_policy(path), {"policy"}) is None


@fuzz
@given(some_of(["tables", "tiers", "transform", "fingerprint"]))
def test_calibrations(changes):
    table = np.zeros((1, 1, 2), np.float16)
    valid = {
        "tables": ((table, None),),
        "tiers": ("K8v4V8v4",),
        "transform": dkv.WithoutRope(),
        "fingerprint": "x",
    }
    made = attempt(lambda: dkv.Calibration(**valid | changes), changes)
    assert made is None or (
        len(made.tables) == len(made.tiers) and isinstance(made.transform, dkv.Transform)
    )


def test_the_check_sees_faults():
    with pytest.raises(AssertionError, match="names none of"):
        attempt(lambda: int("x"), {"window"})
    with pytest.raises(AttributeError):
        attempt(lambda: None.shape, {"window"})
    with pytest.raises(AssertionError, match="is <class 'numpy.float64'>"):
        assert_plain({"a": (np.float64(1),)})
    policy = dkv.snapkv()
    object.__setattr__(policy.keep, "keep", [0.5])
    with pytest.raises((AssertionError, TypeError)):
        check(policy, set())
    policy = dkv.snapkv()
    object.__setattr__(policy.keep, "keep", np.inf)
    with pytest.raises(ValueError, match="keep=inf"):
        check(policy, set())


def test_values_known_only_when_running():
    for make in (
        lambda x: dkv.snapkv(keep=x),
        lambda x: dkv.diffkv(x),
        lambda x: dkv.quantized("K8V4", window=x),
    ):
        with pytest.raises(TypeError, match="must be known when compiling"):
            jax.jit(lambda x, make=make: make(x).keep)(0.5)
