"""Any value for any argument of `generate`, `make_cache`, `teacher_forced` and `calibrate`: an
error that names it, or it is computed.

DIFFKV_JAX_FUZZ=ci or =hour draws more (`nasty.PROFILES`). What would be computed is left out: each
shape would compile for seconds.
"""

import importlib
import inspect

import numpy as np
import pytest
from hypothesis import given, strategies as st

import diffkv_jax as dkv
from diffkv_jax.evaluation import forcing
from diffkv_jax.testing.tiny import tiny_model
from nasty import attempt, fuzz, some_of, values

MODEL = tiny_model(max_len=256)
TEXTS = [[1, 2, 3], [4, 5]]


class Computed(Exception):
    """The arguments were taken."""


@pytest.fixture(scope="module")
def first():
    """The cache of a first turn; every refused call must leave it."""

    class Shown:  # a failing example is shown with its fixtures: not all numbers
        cache = dkv.generate(*MODEL, TEXTS, max_new_tokens=2, max_len=128).cache

    return Shown


@pytest.fixture(scope="module", autouse=True)
def nothing_computed(first):
    def computed(*_, **__):
        raise Computed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("diffkv_jax.generate"), "_run", computed)
        for name in ("make_cache", "calibration.calibrate", "evaluation.forcing"):
            module = importlib.import_module(f"diffkv_jax.{name}")
            found = [
                part for part in ("_allocated", "_collect", "prefill") if hasattr(module, part)
            ]
            patch.setattr(module, found[0], computed)
        yield
    on = dkv.generate(*MODEL, [[], []], max_new_tokens=2, cache=first.cache)
    whole = dkv.generate(*MODEL, TEXTS, max_new_tokens=4, max_len=128)
    np.testing.assert_array_equal(
        on.tokens, whole.tokens[:, 2:], err_msg="the cache must work as before"
    )


def taken_or_refused(call, names) -> None:
    try:
        attempt(call, names)
    except Computed:
        pass


def names_of(function, *without: str) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in without]


@fuzz
@given(some_of(names_of(dkv.generate, "cache")))
def test_generate(changes):
    taken_or_refused(
        lambda: dkv.generate(**{"model": MODEL[0], "params": MODEL[1], "tokens": TEXTS} | changes),
        {*changes, "prompt"},
    )


@fuzz
@given(some_of(names_of(dkv.generate, "model", "params")))
def test_generate_from_a_cache(first, changes):
    call = {
        "model": MODEL[0],
        "params": MODEL[1],
        "tokens": [[], [3]],
        "cache": first.cache,
        "max_new_tokens": 2,
    } | changes
    taken_or_refused(lambda: dkv.generate(**call), {*changes, "prompt", "prompts"})
    assert not first.cache.counters.seq_len.is_deleted()


prompts = st.lists(
    st.one_of(st.none(), st.lists(st.one_of(st.integers(-2, 100), values), max_size=4), values),
    max_size=3,
)


@fuzz
@given(
    prompts,
    st.one_of(st.none(), prompts),
    st.one_of(st.none(), st.lists(values, max_size=3), values),
)
def test_prompts(first, tokens, mask, lengths):
    taken_or_refused(
        lambda: dkv.generate(*MODEL, tokens, lengths, attention_mask=mask, cache=first.cache),
        {"tokens", "attention_mask", "lengths", "prompt", "prompts"},
    )
    taken_or_refused(
        lambda: dkv.generate(*MODEL, {"input_ids": tokens, "attention_mask": mask}),
        {"tokens", "attention_mask", "prompt"},
    )


@fuzz
@given(some_of(names_of(dkv.make_cache)))
def test_make_cache(changes):
    taken_or_refused(
        lambda: dkv.make_cache(
            **{"model": MODEL[0], "policy": "diffkv", "totals": [100, 50]} | changes
        ),
        {*changes, "request"},
    )


@fuzz
@given(some_of(names_of(forcing.teacher_forced)))
def test_teacher_forced(changes):
    call = {
        "model": MODEL[0],
        "params": MODEL[1],
        "tokens": [[1, 2, 3]],
        "context": 2,
        "policy": "diffkv",
    } | changes
    taken_or_refused(lambda: forcing.teacher_forced(**call), {*changes, "prompt"})


@fuzz
@given(some_of(names_of(dkv.calibrate)))
def test_calibrate(changes):
    call = {
        "model": MODEL[0],
        "params": MODEL[1],
        "tokens": [[1, 2, 3, 4]],
        "policy": "coupled_quantization",
        "progress": False,
    } | changes
    taken_or_refused(lambda: dkv.calibrate(**call), {*changes, "prompt", "sequences"})


@fuzz
@given(some_of(names_of(dkv.Sample)))
def test_sample(changes):
    sampling = attempt(lambda: dkv.Sample(**changes), changes)
    assert sampling is None or (
        hash(sampling) is not None
        and {type(x) for x in vars(sampling).values()} <= {int, float, type(None)}
    )
