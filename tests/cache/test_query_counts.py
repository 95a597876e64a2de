"""The queries that scored a token, over several prompts and decode steps, against plain
counting.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.cache.query_counts import SPANS, count_observed, nothing_observed
from diffkv_jax.pallas_kernels.plan_event import mean_significance


def counted(turns: list[tuple[int, int, int]]) -> tuple[np.ndarray, list[int]]:
    """`observed` of one request after turns of (unobserved prompt rows, observing rows, decode
    steps), and the observing positions.
    """
    observed, length, positions = nothing_observed(1), 0, []
    for silent, rows, steps in turns:
        length += silent
        for count in (rows, *[1] * steps):
            positions += range(length, length + count)
            length += count
            observed = count_observed(observed, jnp.array([count]), jnp.array([length]))
    return np.asarray(observed), positions


def scored_by(observed: np.ndarray, length: int) -> np.ndarray:
    """The divisor of every position, read off the mean of S = 1."""
    ones, position = jnp.ones((1, length), jnp.float32), jnp.arange(length)[None]
    return np.round(
        1 / np.asarray(mean_significance(ones, position, jnp.asarray(observed)))[0]
    ).astype(int)


@pytest.mark.daily(3)
@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_divided_by_the_queries_that_saw_it(seed):
    rng = np.random.default_rng(seed)
    turns = [tuple(rng.integers((0, 1, 0), (90, 64, 40))) for _ in range(SPANS)]
    observed, positions = counted(turns)
    length = positions[-1] + 1
    expected = [sum(p >= t for p in positions) for t in range(length)]
    np.testing.assert_array_equal(scored_by(observed, length), expected)
    # what one running count would say
    wrong = np.minimum(length - np.arange(length), len(positions))
    assert (wrong != expected).any()


def test_more_turns_than_spans_keep_the_total():
    observed, positions = counted([(5, 3, 2)] * (SPANS + 4))
    assert observed[0, :, 1].sum() == len(positions)
    assert scored_by(observed, 1)[0] == len(positions)
    assert scored_by(observed, positions[-1] + 1)[-1] == 1


def test_nothing_scored_changes_nothing():
    observed = count_observed(nothing_observed(2), jnp.array([4, 0]), jnp.array([10, 10]))
    assert np.asarray(observed)[0, -1].tolist() == [10, 4]
    assert not np.asarray(observed)[1].any()
