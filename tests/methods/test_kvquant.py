"""KVQuant (arXiv:2401.18079): learned levels, static ranges of channels, dynamic ranges of tokens,
outliers apart; and with CQ keys.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kvquant_equations import apart, channel_levels, half, token_levels

import diffkv_jax as dkv
from diffkv_jax.calibration.kmeans import weighted_kmeans
from diffkv_jax.pallas_kernels.codecs import Fitting, Levels, LowRank, Outliers, StaticLevels
from diffkv_jax.testing.quantiser import fake_quantise, pack

HOW = Fitting(partial(weighted_kmeans, iterations=30), q_norm=False)


def block(x: np.ndarray) -> jax.Array:
    """`[n, d]` as a block of one head `[1, d, n]`."""
    return jnp.asarray(x.T[None])


def run(codec, x: np.ndarray) -> np.ndarray:
    payload, meta = codec.encode(block(x))
    assert payload.shape == (1, codec.rows(x.shape[1]), len(x)) and meta.shape == (
        1,
        codec.meta_rows,
        len(x),
    )
    return np.asarray(codec.decode(payload, meta))[0].T


@pytest.mark.daily(2)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_levels_of_a_tokens_range(bits):
    rng = np.random.default_rng(0)
    levels = half(np.sort(rng.uniform(-1, 1, 2**bits)))
    x = rng.normal(size=(40, 32)).astype(np.float32)
    codec = Levels(bits, jnp.asarray(levels[None], jnp.float16))
    np.testing.assert_allclose(run(codec, x), token_levels(x, levels), atol=1e-5)
    assert np.abs(run(codec, x) - token_levels(x, -levels[::-1])).max() > 0.05
    assert np.isfinite(run(codec, np.ones((3, 32), np.float32))).all()


def test_three_bits_are_packed_as_two_and_one():
    levels = np.linspace(-1, 1, 8).astype(np.float16)
    codes = np.random.default_rng(0).integers(0, 8, (32, 5))
    codes[:2] = [[0] * 5, [7] * 5]  # the ends of the range
    payload, _ = Levels(3, jnp.asarray(levels[None])).encode(
        jnp.asarray(levels[codes][None], jnp.float32)
    )
    expected = np.concatenate(
        [pack((codes & 3).astype(np.uint8), 2), pack((codes >> 2).astype(np.uint8), 1)]
    )
    np.testing.assert_array_equal(payload[0], expected)


@pytest.mark.slow
def test_outliers_of_keys_are_those_beyond_their_channels_range():
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=32) * 2)  # channels of very different size
    table = half(np.sort(rng.uniform(-1, 1, (1, 8))) * scale[:, None] + scale[:, None])
    x = (rng.normal(size=(50, 32)) * scale + scale).astype(np.float32)
    codec = Outliers(StaticLevels(3), 0.01, fill="median").for_block(32, 50)
    codec = codec.with_table(jnp.asarray(table[None, ..., None], jnp.float16))
    found = run(codec, x)
    scaled = (x - table[:, 0]) / (table[:, -1] - table[:, 0])
    np.testing.assert_allclose(
        found, apart(x, scaled, lambda rest: channel_levels(rest, table)), atol=1e-5
    )
    # ranked by size alone
    assert np.abs(found - apart(x, x, lambda rest: channel_levels(rest, table))).max() > 0.1


@pytest.mark.parametrize(
    ("bits", "share", "k_bits", "v_bits"),
    [(4, 0.01, 4.75, 5.25), (3, 0.01, 3.75, 4.25), (2, 0, 2, 2.5)],
)
def test_bits_an_element(bits, share, k_bits, v_bits):
    """At 64 channels one percent is one large and one small value: 2 (16 + 8) / 64 = 0.75 bits; a
    token's range is 32 / 64 = 0.5.
    """
    (fmt,) = dkv.kvquant(bits, share).formats("float32")
    fmt = fmt.for_block(64, 32)
    assert fmt.token_bytes(64) == (k_bits + v_bits) * 64 / 8


def test_levels_are_learned():
    """On the scale of the range without outliers; they lose less than even levels, Fisher weights
    move them, Q-Norm keeps the deviation.
    """
    rng = np.random.default_rng(0)
    x = (
        rng.laplace(size=(2, 16, 3000)).astype(np.float32)
        * np.exp(rng.normal(size=(2, 16, 1))).astype(np.float32)
        + 3
    )
    ones, codec = (
        jnp.ones_like(x),
        Outliers(StaticLevels(2), 0.02, fill="median").for_block(16, 3000),
    )

    def learn(fisher, **how) -> np.ndarray:
        return np.asarray(
            codec.fit(jnp.asarray(x), fisher, jax.random.key(0), HOW._replace(**how)),
            np.float32,
        )[..., 0]

    low, high = np.quantile(x, [0.01, 0.99], axis=-1)
    scale, middle = ((high - low) / 2)[..., None], ((high + low) / 2)[..., None]
    table = learn(ones)
    levels = (table - middle) / scale
    # the layer's levels in every channel
    np.testing.assert_allclose(levels, np.broadcast_to(levels[:1, :1], levels.shape), atol=5e-3)
    assert levels.min() > -1 and levels.max() < 1 and (np.diff(levels) > 0.1).all()
    scaled = (x - middle) / scale
    inside = np.abs(scaled) <= 1

    def error(levels: np.ndarray, weight=inside) -> float:
        return float(
            (np.square(np.abs(scaled[..., None] - levels).min(axis=-1)) * weight).sum()
            / weight.sum()
        )

    assert error(levels[0, 0]) < 0.7 * error(np.linspace(-1, 1, 4))
    fisher = np.where(scaled > 0.3, 10.0, 0.1).astype(np.float32)
    weighted = ((learn(jnp.asarray(fisher)) - middle) / scale)[0, 0]
    assert error(weighted, inside * fisher) < 0.7 * error(levels[0, 0], inside * fisher) and error(
        weighted
    ) > error(levels[0, 0])
    normed = ((learn(ones, q_norm=True) - middle) / scale)[0, 0]

    def deviation(levels: np.ndarray) -> float:
        """Of what is decoded, in that of what was coded; the codes are those of the levels as they
        were learned (appendix).
        """
        values = scaled[inside]
        return float(
            levels[np.abs(values[:, None] - table_levels).argmin(axis=1)].std() / values.std()
        )

    table_levels = levels[0, 0]
    assert deviation(table_levels) < 0.95 and abs(deviation(normed) - 1) < 0.02


def test_learned_levels_lose_less_than_even_ones():
    x = np.random.default_rng(0).normal(size=(600, 64)).astype(np.float32)
    table = Levels(3).fit(block(x), jnp.ones((1, 64, 600)), jax.random.key(0), HOW)
    learned, even = (
        np.square(y - x).mean() for y in (run(Levels(3, table), x), fake_quantise(x, 3))
    )
    assert 0.1 * even < learned < 0.8 * even


def test_a_low_rank_beside_changes_nothing_that_is_learned():
    x = np.random.default_rng(0).laplace(size=(1, 32, 64)).astype(np.float32)
    apart = Outliers(Levels(2), 0.05, fill="median").for_block(32, 64)
    codecs = (apart, LowRank(apart, 2).for_block(32, 64), Levels(2))
    with_rank, without, plain = (
        np.asarray(c.fit(jnp.asarray(x), jnp.ones_like(x), jax.random.key(0), HOW)) for c in codecs
    )
    np.testing.assert_array_equal(with_rank, without)
    assert (without != plain).any()
