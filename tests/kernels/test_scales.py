"""Scales, zero points and outliers of any size: the rule against its reference in NumPy, and how
near codes over it come.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_oracle import of_any_size

from diffkv_jax.pallas_kernels.codecs import Outliers, Uniform, scales
from diffkv_jax.testing import stored_numbers as rule
from diffkv_jax.testing.quantiser import quantise

RNG = np.random.default_rng(0)
SIZES = (RNG.normal(size=20000) * 10.0 ** RNG.uniform(-37, 38, 20000)).astype(np.float32)
EDGES = np.float32(
    [0, 65504, 65519.996, 65520, 2.0**-16, np.nextafter(np.float32(2.0**-16), 0), 1e-37, 3e38]
)


def half(bits) -> np.ndarray:
    return np.asarray(bits).astype(np.uint16).view(np.float16)


def test_hand_worked_pairs():
    """A range that float16 holds; 0 to 255 * 1000003, of which neither does; a tiny one."""
    low = jnp.float32([-1, 0, -3e-9])
    high = jnp.float32([1, 255 * 1000003.0, 0])
    scale, zero, scale_bits, zero_bits = map(np.asarray, scales.grid(low, high, 255))
    # codes come from the unrounded scale
    assert scale[0] == np.float32(2) / np.float32(255) and zero[0] == -1
    assert half(scale_bits)[0] == np.float16(2 / 255) and half(zero_bits)[0] == -1
    assert scale[1] == 1003520 == 245 * 2.0**12 and zero[1] == 0  # eight bits, rounded up
    assert scale_bits[1] == 0x8000 | 0x4975 and zero_bits[1] == 0  # 1003520 = 1.9140625 * 2^19
    assert -3e-9 >= zero[2] > -3.03e-9 and scale[2] * 255 >= -zero[2] and scale[2] * 255 < 3.06e-9
    np.testing.assert_array_equal(scales.scale_of(scales.as_half(scale_bits))[1:], scale[1:])


def test_scales_and_zero_points_are_the_rule():
    scale = np.abs(np.concatenate([SIZES, EDGES, 1e-8 * SIZES[:8]]))
    zero = np.concatenate([RNG.permutation(SIZES), -EDGES, EDGES])
    wide = rule.needs_bfloat16(scale, zero)
    assert 0.3 < wide.mean() < 0.95
    np.testing.assert_array_equal(scales.needs_wide(jnp.asarray(scale), jnp.asarray(zero)), wide)
    inside = np.maximum(scale, np.abs(zero)) < 2.0**119
    scale, zero, wide = scale[inside], zero[inside], wide[inside]
    wanted = rule.marked(scale, wide), rule.beside(zero, wide)
    for one, other in zip(
        scales.pair_bits(*map(jnp.asarray, (scale, zero, wide))), wanted, strict=True
    ):
        np.testing.assert_array_equal(half(one).view(np.uint16), other.view(np.uint16))
    # float16, and bits as TPU kernels have them
    for stored in (jnp.asarray, lambda x: jnp.asarray(x.view(np.int16).astype(np.int32))):
        np.testing.assert_array_equal(
            scales.scale_of(stored(wanted[0])), rule.read_scale(wanted[0])
        )
        np.testing.assert_array_equal(scales.zero_of(*map(stored, wanted)), rule.read_zero(*wanted))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_error_is_half_a_step(bits: int):
    """Of tokens of every size but those at the ends of float32: at most half of the range's share,
    and a hundredth of it.
    """
    x = of_any_size(400, 32, bits)
    x = x[np.abs(x).max(axis=1) < 1e35]
    codec = Uniform(bits)
    read = np.asarray(jax.jit(lambda x: codec.decode(*codec.encode(x)))(x.T)).T.astype(np.float64)
    span = x.max(axis=1).astype(np.float64) - x.min(axis=1)
    # of zero points, beside constant tokens
    coarse = np.abs(x).max(axis=1) / 2.0 ** (8 if bits == 8 else 10)
    step = span / (2**bits - 1)
    assert np.all(np.abs(read - x).max(axis=1) <= 0.5 * step + 0.01 * span + coarse)
    assert np.abs(x).max() > 1e29 and np.abs(x)[x != 0].min() < 1e-29


def test_what_float16_holds_is_as_it_was():
    """Codes from the unrounded scale and zero point, both rounded to float16."""
    x = (RNG.normal(size=(500, 64)) * 10.0 ** RNG.uniform(-1, 4, (500, 1))).astype(np.float32)
    low, high = x.min(axis=1), x.max(axis=1)
    scale = (high - low) / np.float32(255)
    codes, kept_scale, kept_zero = quantise(x, 8)
    np.testing.assert_array_equal(
        codes, np.clip(np.rint((x - low[:, None]) / scale[:, None]), 0, 255)
    )
    np.testing.assert_array_equal(kept_scale[:, 0], scale.astype(np.float16))
    np.testing.assert_array_equal(kept_zero[:, 0], low.astype(np.float16))
    got = half(jnp.stack(scales.grid(jnp.asarray(low), jnp.asarray(high), 255)[2:]))
    np.testing.assert_allclose(got, np.stack([scale, low]).astype(np.float16), rtol=1e-3)
    assert not np.signbit(got[0]).any()


def test_what_is_no_number_stays_none():
    for low, high in ((np.nan, np.nan), (-np.inf, 0), (0, np.inf), (-np.inf, np.inf)):
        *_, scale, zero = scales.grid(jnp.float32(low), jnp.float32(high), 255)
        read = scales.scale_of(scales.as_half(scale)) * jnp.arange(256) + scales.zero_of(
            scales.as_half(scale), scales.as_half(zero)
        )
        assert not np.isfinite(read[1:]).any()
    for number in (np.nan, np.inf):
        assert not np.isfinite(
            scales.scale_of(scales.as_half(scales.scale_bits(jnp.float32(number))))
        )


def test_pairs_of_outliers():
    """Read back as float16 has them, or to eight bits; also equal ones, and the largest number
    beside the smallest.
    """
    x = np.concatenate([SIZES, [1e6, 70000, -70000, 1e-9, 0, 65504, -65504, 1e5, -1e30]]).astype(
        np.float32
    )
    x = x[(np.abs(x) < 2.0**118) & ((x == 0) | (np.abs(x) > 1e-28))]
    y = np.concatenate([RNG.permutation(x)[: len(x) - 9], x[-9:]])
    larger, smaller = np.maximum(x, y), np.minimum(x, y)
    stored = [half(bits) for bits in scales.outlier_bits(jnp.asarray(larger), jnp.asarray(smaller))]
    # the same bfloat16, maybe
    read, nearly_equal = (
        rule.read_outliers(*stored),
        np.abs(larger - smaller) <= 2.0**-7 * np.abs(larger),
    )
    for found, one in zip(read, (larger, smaller), strict=True):
        size = np.maximum(np.abs(larger), np.abs(smaller))
        exact = one.astype(np.float64)
        close = np.where(nearly_equal, 2.0**-6.4, 2.0**-8) * np.abs(exact) + np.where(
            (size >= 2.0**-16) & (size < 65520), 2.0**-25, 0
        )
        assert np.all(np.abs(found - exact) <= close)
    inside = (
        (np.abs(larger) < 65520)
        & (np.abs(smaller) < 65520)
        & (np.maximum(np.abs(larger), np.abs(smaller)) >= 2.0**-16)
    )
    np.testing.assert_array_equal(read[0][inside], larger[inside].astype(np.float16))
    assert inside.mean() > 0.05
    for found, again in zip(scales.outliers_of(*map(jnp.asarray, stored)), read, strict=True):
        np.testing.assert_array_equal(found, again)


def test_outliers_beyond_float16_in_a_token():
    """One huge channel in ordinary tokens: it is kept to eight bits and the others as well as
    without it.
    """
    x = RNG.normal(size=(64, 32)).astype(np.float32)
    x[7] = 1e9 * (1 + RNG.random(32))
    codec = Outliers(Uniform(4), 0.05).for_block(64, 32)
    read = np.asarray(codec.decode(*jax.jit(codec.encode)(x)))
    np.testing.assert_allclose(read[7], x[7], rtol=2.0**-8)
    assert np.isfinite(read).all()


def test_lengths_of_any_size():
    x = RNG.normal(size=(5, 64)).astype(np.float32) * np.float32(
        [[1], [1e30], [1e-30], [1e19], [0]]
    )
    wanted = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(scales.length(jnp.asarray(x)), wanted, rtol=1e-6)
