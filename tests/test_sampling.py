"""`next_token`: its distribution against one by sorting in NumPy, and ties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax import Greedy, Sample
from diffkv_jax.sampling import next_token, rules


def numpy_distribution(sampling: Sample, logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 [vocab] by sorting, one restriction after the other."""
    p = np.exp(logits.astype(np.float64) / sampling.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if sampling.top_k is not None:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    if sampling.top_p is not None:
        count = int(np.searchsorted(np.cumsum(p[order]), sampling.top_p)) + 1
        p[order[count:]] = 0
        p /= p.sum()
    if sampling.min_p is not None:
        p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


SAMPLINGS = [
    Sample(),
    Sample(temperature=0.5),
    Sample(temperature=2.0, top_k=4),
    Sample(top_k=1),
    Sample(top_k=1000),
    Sample(top_p=0.7),
    Sample(top_p=1e-6),
    Sample(min_p=0.2),
    Sample(temperature=1.5, top_k=8, top_p=0.85, min_p=0.15),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_distribution_of_samples(sampling, key):
    draws = 20_000
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32) * 1.5
    keys = jax.random.split(key, draws)
    tokens = jax.jit(next_token)(
        rules([sampling] * draws), jnp.broadcast_to(logits, (draws, 12)), keys
    )
    share = np.bincount(np.asarray(tokens), minlength=12) / draws
    wanted = numpy_distribution(sampling, logits)
    assert not share[wanted == 0].any(), "a token outside the allowed set was drawn"
    assert np.abs(share - wanted).max() < 0.015  # four standard deviations
    other = numpy_distribution(Sample(temperature=0.8, top_k=3), logits)
    assert np.abs(share - other).max() > 0.03, "the comparison must reject another distribution"


def test_greedy_takes_the_lowest_id_of_equals(key):
    logits = jnp.array([[0.0, 2.0, 2.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -jnp.inf, -1.0, -2.0]])
    np.testing.assert_array_equal(
        next_token(rules([Greedy()] * 3), logits, jax.random.split(key, 3)), [1, 0, 0]
    )


@pytest.mark.daily(3)
@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_the_lowest_temperature_is_greedy(limits):
    """Logits over it would be infinite, and all of them equal."""
    logits = jnp.asarray([[3.0, 5.0, 90.0, 100.0, 4.0]])
    asked = rules([Sample(temperature=1.2e-38, **limits)])
    assert [
        int(next_token(asked, logits, jax.random.split(jax.random.key(seed), 1))[0])
        for seed in range(3)
    ] == [3, 3, 3]
