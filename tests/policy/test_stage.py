"""Stages as data: what is kept, compared, compiled by and written to JSON."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.policy.stage import Stage, data, from_mapping, static, to_mapping


class Part(Stage):
    ids: tuple[int, ...] = static(default=())


class Own(dkv.KeyScore):
    """A score with a tuple, a number and a stage."""

    layers: tuple[int, ...] = static(default=(0, 1))
    factor: float = 0.5
    part: Part = static(default=Part(ids=(1, 2)))

    def enter(self, tokens):
        return tokens.scores


class Needed(Stage):
    centre: int = static()


class Both(dkv.Keep):
    inner: dkv.Keep = data(default=dkv.Budget(keep=0.25))
    ranks = True

    def thresholds(self, view):
        return self.inner.thresholds(view)


HALF = dkv.Budget(keep=0.5)


def policy(score: dkv.Score, keep: dkv.Keep = HALF) -> dkv.CompressionPolicy:
    return dkv.CompressionPolicy("own", score=score, keep=keep)


@pytest.mark.parametrize("score", [Own(layers=(3,)), Own(part=Part(ids=(7,)))], ids=str)
def test_json_gives_equal_stages(score: dkv.Score):
    made = policy(score)
    again = dkv.CompressionPolicy.from_json(made.to_json())
    assert again == made and hash(again) == hash(made) and repr(again) == repr(made)
    kind = json.loads(made.to_json())["score"]["type"]
    assert kind == f"{__name__}:{type(score).__name__}"


def test_json_of_a_field_that_is_missing():
    assert from_mapping("part", to_mapping(Needed(5)), Needed) == Needed(5)
    with pytest.raises(TypeError, match="part: .*'centre'"):
        from_mapping("part", {"type": f"{__name__}:Needed"}, Needed)


@pytest.mark.parametrize("layers", [[1], np.arange(2), {1: 2}])
def test_what_programs_cannot_be_compiled_by(layers):
    with pytest.raises(TypeError, match="layers=.* must be hashable.*a tuple for a list"):
        Own(layers=layers)


def test_another_static_field_is_another_structure():
    structures = {jax.tree.structure(policy(Own(factor=factor))) for factor in (0.5, 0.5, 0.7)}
    assert len(structures) == 2
    assert jax.tree.leaves(policy(Own())) == [0.5]  # the budget


def test_stages_are_frozen_and_checked_once():
    with pytest.raises(dataclasses.FrozenInstanceError):
        dkv.KeyNorm().queries = 3  # pyright: ignore[reportAttributeAccessIssue]
    traced = jax.eval_shape(lambda keep: keep, dkv.Budget(keep=0.5))
    assert isinstance(traced, dkv.Budget)  # whose check would not take a shape


def test_a_stage_within_a_stage_is_bound():
    bound = policy(dkv.KeyNorm(), Both()).bind(3, 2, 1).keep
    assert isinstance(bound, Both) and bound.inner.keep.shape == (3, 2, 1)


@pytest.mark.parametrize("keep", [2**31 - 1, 2**30 + 1, [[[2**31 - 1]], [[5000]]]])
def test_more_tokens_than_any_context(keep):
    bound = dkv.h2o(keep).bind(2, 1, 1).keep.keep
    assert bound.dtype == np.int32 and bound.min() >= 5000
    assert dkv.pyramidkv(2**31 - 1).bind(4, 1, 1).keep.keep.min() > 10**7


class Data(dkv.KeyScore):
    weight: float = data(default=0.5)

    def enter(self, tokens):
        return tokens.scores


class Hides(dkv.KeyScore):
    @property
    def hides_dropped(self) -> bool:
        return True

    def enter(self, tokens):
        return tokens.scores


class Resets(dkv.Score):
    resets, per_query = True, True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policy(dkv.Score()), "ranks by attention: give queries=64"),
        (lambda: policy(dkv.KeyScore()), "ranks by attention"),
        (lambda: policy(Data()), r"score=Data\(\) has fields made by data\(\)"),
        (lambda: policy(Hides()), "shares_tokens=True"),
        (lambda: policy(Resets(queries=8)), "forgets queries that per_query=True divides by"),
        (lambda: policy(dkv.PivotalContext(queries=8), dkv.HeadClasses()), "needs keep=Budget"),
        (lambda: policy(dkv.kvzip().score, dkv.HeadClasses()), "never run then|measures attention"),
        (lambda: dkv.CompressionPolicy("x", tiers=("K8V4", "K4V2")), "a second tier needs scores"),
        (
            lambda: dkv.Budget(share_heads=0.0, share_layers=True, layers="pyramid"),
            "leave one out",
        ),
    ],
)
def test_choices_that_cannot_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bound_policies_have_no_name():
    bound = dkv.diffkv(1.0, 0.5).bind(1, 1, 1)
    assert bound.name == "" and isinstance(bound.keep.alpha_high, np.ndarray)
    np.testing.assert_array_equal(jnp.asarray(bound.keep.alpha_low), [[[0.5]]])
