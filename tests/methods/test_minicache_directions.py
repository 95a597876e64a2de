"""The direction that two layers share, as the codec of one head stores and restores it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.pallas_kernels.codecs import Full, Shared, Uniform
from diffkv_jax.testing import quantiser
from oracles import minicache

ARROW = np.array([3.0, 4.0, 0, 0])  # length 5


@pytest.mark.parametrize(
    ("y", "direction"),
    [
        (2 * ARROW, [0.6, 0.8, 0, 0]),  # parallel: restored exactly
        (-2 * ARROW, [-0.6, -0.8, 0, 0]),  # opposite: the line ends nearer to the second
        (
            [-8.0, 6.0, 0, 0],
            np.cos(0.3 * np.pi) * np.array([0.6, 0.8, 0, 0])
            + np.sin(0.3 * np.pi) * np.array([-0.8, 0.6, 0, 0]),
        ),
    ],
    ids=["parallel", "opposite", "orthogonal"],
)
def test_directions_between(y, direction):
    block = jnp.asarray(np.concatenate([ARROW, y])[:, None], jnp.float32)
    codec = Shared(Full("float32"), 0.6)
    payload, meta = codec.encode(block)
    for which, norm in enumerate((5, 10)):
        found = dataclasses.replace(codec, reads=which).decode(payload, meta)[:, 0]
        np.testing.assert_allclose(found, norm * np.asarray(direction), atol=1e-5)


def test_a_vector_of_zeros():
    codec = Shared(Full("float32"), 0.6, reads=1)
    for halfway in (codec, dataclasses.replace(codec, t=0.5)):
        payload, meta = halfway.encode(
            jnp.asarray(np.concatenate([np.zeros(4), ARROW])[:, None], jnp.float32)
        )
        np.testing.assert_allclose(halfway.decode(payload, meta)[:, 0], ARROW, atol=1e-5)
        np.testing.assert_array_equal(
            dataclasses.replace(halfway, reads=0).decode(payload, meta), 0
        )


@pytest.mark.slow
def test_directions_in_four_bits():
    """What is stored, and what attention makes of it, against the equations and the reference
    quantiser.
    """
    rng = np.random.default_rng(0)
    x, y, q = (rng.normal(size=(n, 32)).astype(np.float32) for n in (7, 7, 3))
    codec = Shared(Uniform(4, 2), 0.6)
    payload, meta = codec.encode(jnp.concatenate([x.T, y.T]))
    assert payload.shape == (codec.rows(32), 7) and meta.shape == (codec.meta_rows, 7) == (6, 7)
    direction = quantiser.fake_quantise(minicache.common_direction(x, y, 0.6), 4, 2)
    for which, layer in enumerate((x, y)):
        reader, expected = (
            dataclasses.replace(codec, reads=which),
            np.linalg.norm(layer, axis=1, keepdims=True) * direction,
        )
        np.testing.assert_allclose(reader.decode(payload, meta).T, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(reader.key_logits(q, payload, meta), q @ expected.T, atol=2e-2)
        weights = rng.uniform(size=(3, 7)).astype(np.float32)
        valid = np.arange(7) < 5
        mixed = reader.value_mix(
            weights * valid, payload, meta.at[:, 5:].set(jnp.nan), jnp.asarray(valid)
        )
        np.testing.assert_allclose(mixed, (weights * valid) @ expected, atol=2e-2)
        assert np.abs(expected - layer).max() > 0.5
