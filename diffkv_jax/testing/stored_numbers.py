"""Plain NumPy reference of the 16 bits that scales, zero points and outliers are kept in
(docs/design.md, section 2).

Written from the rule alone; it shares no code with the library. Stored numbers are float16 arrays
whose bits may mean a bfloat16.
"""

import jax.numpy as jnp
import numpy as np

BFLOAT16 = np.dtype(jnp.bfloat16)


def to_half(values):
    """Round float32 to float16; beyond its range the answer is infinite, without a warning."""
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(values, np.float32).astype(np.float16)


def saturated(values):
    """Finite numbers are kept within 2^119."""
    return np.where(np.isinf(values), values, np.clip(values, -(2.0**119), 2.0**119)).astype(
        np.float32
    )


def too_large(size):
    """Finite, and infinite as float16."""
    return np.isfinite(size) & np.isinf(to_half(size))


def needs_bfloat16(scale, zero=0.0):
    """Too large for float16, or a scale below 2^-16 beside a zero point below 2^-8."""
    size = np.maximum(scale, np.abs(zero))
    return too_large(size) | ((scale < 2.0**-16) & (size < 2.0**-8) & (size > 0))


def down(values):
    """The largest bfloat16 (eight significant bits) up to each number."""
    fraction, exponent = np.frexp(np.asarray(values, np.float64))
    return np.ldexp(np.floor(fraction * 256) / 256, exponent).astype(np.float32)


def marked(scale, wide):
    """Scales as they are stored: bfloat16 with the sign bit set where `wide`, else float16."""
    bits = np.asarray(scale, np.float32).astype(BFLOAT16).view(np.uint16) | 0x8000
    return (
        np.where(wide, bits, to_half(scale).view(np.uint16) & 0x7FFF)
        .astype(np.uint16)
        .view(np.float16)
    )


def beside(zero, wide):
    """Zero points as they are stored."""
    bits = np.asarray(zero, np.float32).astype(BFLOAT16).view(np.uint16)
    return np.where(wide, bits, to_half(zero).view(np.uint16)).astype(np.uint16).view(np.float16)


def stored_scale(scale):
    """A scale that has no zero point."""
    scale = saturated(scale)
    return marked(scale, needs_bfloat16(scale))


def is_wide(scale):
    """Whether stored scales are bfloat16."""
    return np.signbit(scale)


def read_scale(scale):
    """float32 of stored scales."""
    size = (np.ascontiguousarray(scale).view(np.uint16) & 0x7FFF).view(BFLOAT16).astype(np.float32)
    return np.where(is_wide(scale), size, np.asarray(scale).astype(np.float32))


def read_zero(scale, zero):
    """float32 of the zero points beside stored scales."""
    return np.where(
        is_wide(scale),
        np.ascontiguousarray(zero).view(BFLOAT16).astype(np.float32),
        np.asarray(zero).astype(np.float32),
    )


def grid(low, high, most):
    """(scale, zero) that codes 0 to `most` over a range are made with, float32, and the two as
    stored.
    """
    low, high = saturated(low), saturated(high)
    scale, zero = (high - low) / np.float32(most), low
    wide = needs_bfloat16(scale, zero)
    zero = np.where(wide, down(zero), zero)
    scale = np.where(wide, -down(-((high - zero) / np.float32(most))), scale)
    return scale, zero, marked(scale, wide), beside(zero, wide)


def kept_outlier(values):
    """Outliers as they are read back, each by itself: float16, of those beyond it bfloat16."""
    half = to_half(values).astype(np.float32)
    return np.where(
        too_large(values), np.asarray(values, np.float32).astype(BFLOAT16).astype(np.float32), half
    )


def read_outliers(first, second):
    """float32 of stored pairs: float16 with the larger one first, or bfloat16 with the smaller one
    first.
    """
    small, large = (
        np.ascontiguousarray(x).view(BFLOAT16).astype(np.float32) for x in (first, second)
    )
    turned = small < large
    return np.where(turned, large, first.astype(np.float32)), np.where(
        turned, small, second.astype(np.float32)
    )
