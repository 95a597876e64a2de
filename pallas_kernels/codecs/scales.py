"""Scales, zero points and other numbers beside codes, 16 bits each: float16 where that holds them,
else bfloat16 (docs/design.md 2).

A scale is never negative, so its sign bit says what it and the zero point beside it are: clear
float16, set bfloat16. Numbers come as float16 arrays (XLA, Triton) or as their bits in int32 (TPU
kernels, which know no float16), and are made as bits.
"""

import jax.numpy as jnp
from jax import Array, lax

from .halves import float_to_half, half_to_float

TOO_LARGE = 65520.0  # rounds to infinity in float16
TOO_SMALL = 2.0**-16  # float16 has fewer bits than bfloat16 below
SMALL_ZERO = 2.0**-8  # beside a too small scale; a larger zero is told better in float16
LEAST_OUTLIER = 2.0**-100  # below, float16 zeros do
LIMIT = 2.0**119  # finite numbers saturate there: a block's sums and ranges stay finite


def scale_of(stored: Array) -> Array:
    """A stored scale as float32."""
    return jnp.where(is_wide(stored), _from_bfloat16(_bits(stored) & 0x7FFF), _from_half(stored))


def zero_of(scale: Array, stored: Array) -> Array:
    """The zero point `stored` beside a stored scale, as float32."""
    return either(stored, is_wide(scale))


def either(stored: Array, wide: Array) -> Array:
    """16 bits as float32: bfloat16 where `wide`, else float16."""
    return jnp.where(wide, _from_bfloat16(_bits(stored)), _from_half(stored))


def as_half(bits: Array) -> Array:
    """Bits int32 as the float16 array that keeps them."""
    return lax.bitcast_convert_type(bits.astype(jnp.int16), jnp.float16)


def is_wide(stored: Array) -> Array:
    """Whether a stored scale and the zero point beside it are bfloat16."""
    return (_bits(stored) & 0x8000) != 0


def too_large(size: Array) -> Array:
    """Whether float16 would make finite float32 infinite."""
    return (size >= TOO_LARGE) & (size < jnp.inf)


def needs_wide(scale: Array, zero: Array | float = 0.0) -> Array:
    """Whether float16 does not hold a finite scale and its zero point (float32)."""
    size = jnp.maximum(scale, jnp.abs(zero))
    return too_large(size) | ((scale < TOO_SMALL) & (size > 0) & (size < SMALL_ZERO))


def scale_bits(scale: Array) -> Array:
    """The nearest stored scale to one that has no zero point beside it."""
    return _scale_bits(saturated(scale), needs_wide(scale))


def pair_bits(scale: Array, zero: Array, wide: Array) -> tuple[Array, Array]:
    """The nearest stored numbers to scale and zero point; `wide` says which are bfloat16."""
    return _scale_bits(scale, wide), jnp.where(wide, nearest_bfloat16(zero), float_to_half(zero))


def grid(low: Array, high: Array, most: int) -> tuple[Array, Array, Array, Array]:
    """Codes 0 to `most` over the range `low` to `high`: (scale, zero point) float32 that codes are
    made with, then as stored.

    Those that are stored in float16 are rounded to nearest afterwards, as the paper has it. In
    bfloat16 the zero point is rounded down and the scale up, so that the range is covered, before
    codes are made: the error stays below half a scale.
    """
    low, high = saturated(low), saturated(high)
    scale = (high - low) / most
    wide = needs_wide(scale, low)
    down = _rounded_down(low)
    zero = jnp.where(wide, down, low)
    scale = jnp.where(wide, -_rounded_down((down - high) / most), scale)
    return scale, zero, *pair_bits(scale, zero, wide)


def outlier_bits(larger: Array, smaller: Array) -> tuple[Array, Array]:
    """Two numbers as they are stored beside each other: float16 with the larger one first, or
    bfloat16 with the smaller one first.
    """
    larger, smaller = saturated(larger), saturated(smaller)
    size = jnp.maximum(jnp.abs(larger), jnp.abs(smaller))
    wide = too_large(size) | ((size < TOO_SMALL) & (size > LEAST_OUTLIER))
    high, low = nearest_bfloat16(larger), nearest_bfloat16(smaller)
    below = jnp.where(low > 0x7FFF, low + 1, low - 1)
    low = jnp.where(low == high, below, low)  # else nobody could tell which comes first
    first, second = (jnp.where(jnp.isnan(x), 0x7FFF, float_to_half(x)) for x in (larger, smaller))
    return jnp.where(wide, low, first), jnp.where(wide, high, second)


def outliers_of(first: Array, second: Array) -> tuple[Array, Array]:
    """The larger and the smaller number of `outlier_bits` as float32."""
    smaller, larger = _from_bfloat16(_bits(first)), _from_bfloat16(_bits(second))
    wide = smaller < larger
    return jnp.where(wide, larger, _from_half(first)), jnp.where(wide, smaller, _from_half(second))


def saturated(x: Array) -> Array:
    """Finite numbers within `LIMIT`."""
    return jnp.where(jnp.abs(x) < jnp.inf, jnp.clip(x, -LIMIT, LIMIT), x)


def nearest_bfloat16(x: Array) -> Array:
    """The 16 bits of the bfloat16 nearest (half to even) to finite float32, int32 below 65536."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def unit_of(size: Array) -> tuple[Array, Array]:
    """The largest power of two up to float32 `size`, from 2**-100 to 2**120, and its reciprocal:
    products with them round nothing.
    """
    exponent = lax.bitcast_convert_type(size, jnp.int32) & 0x7F800000
    exponent = jnp.clip(exponent, (127 - 100) << 23, (127 + 120) << 23)
    unit = lax.bitcast_convert_type(exponent, jnp.float32)
    return unit, lax.bitcast_convert_type((254 << 23) - exponent, jnp.float32)


def length(x: Array, axis: int = -1) -> Array:
    """The Euclidean norm of float32 `x` along an axis, which stays; no overflow in squares."""
    unit, inverse = unit_of(jnp.abs(x).max(axis=axis, keepdims=True))
    return unit * jnp.linalg.norm(x * inverse, axis=axis, keepdims=True)


def _bits(stored: Array) -> Array:
    if stored.dtype != jnp.float16:
        return stored
    return lax.bitcast_convert_type(stored, jnp.int16).astype(jnp.int32)


def _from_half(stored: Array) -> Array:
    return stored.astype(jnp.float32) if stored.dtype == jnp.float16 else half_to_float(stored)


def _from_bfloat16(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits << 16, jnp.float32)


def _scale_bits(scale: Array, wide: Array) -> Array:
    """What is no number keeps a clear sign."""
    return jnp.where(wide, nearest_bfloat16(scale) | 0x8000, float_to_half(scale) & 0x7FFF)


def _rounded_down(x: Array) -> Array:
    """The largest bfloat16 up to float32 `x`, as float32."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    bits = bits + jnp.where(bits < 0, 0xFFFF, 0)  # away from zero
    return lax.bitcast_convert_type(bits & -0x10000, jnp.float32)
