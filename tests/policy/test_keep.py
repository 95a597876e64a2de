"""Budgets into thresholds: hand-worked numbers, and NumPy's sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import diffkv_jax as dkv
from diffkv_jax.methods.snapkv import moving_average
from diffkv_jax.policy.keep import KeepView
from diffkv_jax.policy.ranking import PROTECTED, kth_largest

NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, -0.0, 1e-30, -1e-30])


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(NUMBERS, min_size=5, max_size=5), st.integers(1, 5))
def test_kth_largest_is_that_of_a_sort(row, k):
    found = kth_largest(np.array([row, row[::-1]], np.float32), np.array([k, k]))
    assert np.all(np.asarray(found) == np.sort(np.array(row, np.float32))[-k])


SCORES = np.array([[5, 1, 4, 9], [8, 7, 6, 9]], np.float32)  # the last of each row is not live
LIVE = np.array([[True, True, True, False]] * 2)


def threshold(budget, exact, *, share_heads=None, scores=SCORES, live=LIVE):
    """Of each row of `scores`; rows share with `share_heads`. A budget that is no whole number is a
    share of 100 tokens.
    """
    rows, counts = len(scores), float(budget).is_integer()
    policy = dkv.Budget(keep=int(budget) if counts else budget / 100, share_heads=share_heads)
    policy = jax.tree.map(lambda x: jnp.asarray(x)[0, 0], policy.bind((1, 1, rows)))
    view = KeepView(scores, live, np.full(rows, 100), np.full(rows, exact), 1, rows)
    found = np.asarray(policy.thresholds(view))
    np.testing.assert_array_equal(found[:, 0], found[:, 1])  # one tier
    return found[:, 0]


def test_budgets_by_hand():
    np.testing.assert_array_equal(threshold(4, 2), [4, 7])  # two beside the two exact ones
    np.testing.assert_array_equal(threshold(3.9, 2), [5, 8])
    assert np.all(threshold(5, 2) < -1e29)  # all fit
    cut = threshold(2, 2)
    assert np.all(cut > 1e20) and np.all(cut < PROTECTED)  # none but protected tokens


def test_heads_share_a_budget():
    # 8, 7, 6 and 5 of both rows
    np.testing.assert_array_equal(threshold(4, 2, share_heads=0.0), [6 - 1, 6 - 1])
    np.testing.assert_array_equal(threshold(4, 2, share_heads=1.0), [4, 7])  # each its own
    # the best of each, then 7 and 6
    np.testing.assert_array_equal(threshold(3, 1, share_heads=0.7), [5, 6])


@pytest.mark.slow
@pytest.mark.parametrize("budget", [2**30, 2**31 - 1, 3])
def test_shared_budgets_larger_than_any_count(budget):
    """Four heads share: sums of whole layers' budgets would overflow int32."""
    scores = np.arange(12, dtype=np.float32).reshape(4, 3)
    found = threshold(budget, 0, share_heads=0.0, scores=scores, live=np.ones((4, 3), bool))
    assert (scores >= found[:, None]).all()


def test_pyramid_budgets_by_hand():
    """arXiv:2406.02069, sec. 4.2 with beta = 20: of m layers' total k the last gets k / (20 m), the
    first 2 k / m less that, linearly.
    """
    np.testing.assert_allclose(
        dkv.pyramidkv(100).bind(4, 1, 1).keep.keep[:, 0, 0], [195, 131, 68, 5]
    )
    np.testing.assert_allclose(
        dkv.pyramidkv(0.5).bind(4, 1, 1).keep.keep[:, 0, 0] * 200,
        [195, 131 + 2 / 3, 68 + 1 / 3, 5],
        rtol=1e-6,
    )
    # no layer keeps more than all
    np.testing.assert_allclose(
        dkv.pyramidkv(0.8).bind(3, 2, 1).keep.keep[:, 1, 0], [1, 0.8, 0.6], rtol=1e-6
    )


def test_equal_scores_and_protected_ones():
    scores = np.array(
        [[0, 0, 0, 2], [PROTECTED, PROTECTED / 9, 3, 1], [-4, -4, -4, -4]], np.float32
    )
    every = np.ones((1, 4), bool)
    found = np.concatenate(
        [
            threshold(budget, 0, scores=row[None], live=every)
            for budget, row in zip((2, 1, 2), scores, strict=True)
        ]
    )
    # never more than the budget but for protected ones
    np.testing.assert_array_equal((scores >= found[:, None]).sum(axis=1), [1, 2, 0])


def test_moving_average_is_a_convolution():
    x = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    for width in (3, 5):
        expected = [np.convolve(row, np.ones(width) / width, mode="same") for row in x]
        np.testing.assert_allclose(moving_average(x, width), expected, rtol=1e-5, atol=1e-6)
