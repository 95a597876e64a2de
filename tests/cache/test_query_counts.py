"""The queries that scored a token, over several prompts and decode steps, against plain
counting.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.cache.query_counts import SPANS, extend_query_spans, last_queries, no_query_spans
from diffkv_jax.pallas_kernels.plan_event import mean_significance


def counted(turns: list[tuple[int, int, int]]) -> tuple[np.ndarray, list[int]]:
    """`spans` of one request after turns of (unscored prompt rows, scoring rows, decode
    steps), and the scoring positions.
    """
    spans, length, positions = no_query_spans(1), 0, []
    for silent, rows, steps in turns:
        length += silent
        for count in (rows, *[1] * steps):
            positions += range(length, length + count)
            length += count
            spans = extend_query_spans(spans, jnp.array([count]), jnp.array([length]))
    return np.asarray(spans), positions


def scored_by(spans: np.ndarray, length: int) -> np.ndarray:
    """The divisor of every position, read off the mean of S = 1."""
    ones, position = jnp.ones((1, length), jnp.float32), jnp.arange(length)[None]
    return np.round(
        1 / np.asarray(mean_significance(ones, position, jnp.asarray(spans)))[0]
    ).astype(int)


@pytest.mark.daily(3)
@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_divided_by_the_queries_that_saw_it(seed):
    rng = np.random.default_rng(seed)
    turns = [tuple(rng.integers((0, 1, 0), (90, 64, 40))) for _ in range(SPANS)]
    spans, positions = counted(turns)
    length = positions[-1] + 1
    expected = [sum(p >= t for p in positions) for t in range(length)]
    np.testing.assert_array_equal(scored_by(spans, length), expected)
    # what one running count would say
    wrong = np.minimum(length - np.arange(length), len(positions))
    assert (wrong != expected).any()


def test_more_turns_than_spans_keep_the_total():
    spans, positions = counted([(5, 3, 2)] * (SPANS + 4))
    assert spans[0, :, 1].sum() == len(positions)
    assert scored_by(spans, 1)[0] == len(positions)
    assert scored_by(spans, positions[-1] + 1)[-1] == 1


def test_nothing_scored_changes_nothing():
    spans = extend_query_spans(no_query_spans(2), jnp.array([4, 0]), jnp.array([10, 10]))
    assert np.asarray(spans)[0, -1].tolist() == [10, 4]
    assert not np.asarray(spans)[1].any()


@pytest.mark.parametrize("count", [0, 1, 17, 40, 1000])
def test_the_last_queries_alone(count):
    """Nobody is divided by more than so many; the others as before, and counting goes on."""
    spans, positions = counted([(0, 5, 3), (7, 1, 9), (20, 30, 6)])
    length = positions[-1] + 1
    fewer = last_queries(jnp.asarray(spans), jnp.array([count]))
    least = np.maximum(np.minimum(scored_by(spans, length), count), 1)  # the mean divides by that
    np.testing.assert_array_equal(scored_by(fewer, length), least)
    longer = extend_query_spans(fewer, jnp.array([2]), jnp.array([length + 2]))
    assert scored_by(longer, 1)[0] == min(count, len(positions)) + 2
