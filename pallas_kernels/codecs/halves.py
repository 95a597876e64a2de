"""Rounding, and float16 by integer arithmetic: for backends that lack them."""

import jax.numpy as jnp
from jax import Array, lax


def round_half_even(x: Array) -> Array:
    """`round` for backends that lack it; x float32, below 2**22 in size."""
    up = jnp.floor(x + 0.5)
    odd = up - 2.0 * jnp.floor(up * 0.5)
    return up - jnp.where(up - x == 0.5, odd, 0.0)


def half_to_float(bits: Array) -> Array:
    """float16 given as its 16 bits (int32, upper half ignored) to float32, by integer arithmetic:
    for backends without float16.
    """
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    normal = lax.bitcast_convert_type(((exponent + 112) << 23) | (fraction << 13), jnp.float32)
    special = lax.bitcast_convert_type((255 << 23) | (fraction << 13), jnp.float32)
    small = fraction.astype(jnp.float32) * 2.0**-24
    size = jnp.where(exponent == 0, small, jnp.where(exponent == 31, special, normal))
    return jnp.where((bits >> 15) & 1 == 1, -size, size)


def float_to_half(x: Array) -> Array:
    """float32 to the 16 bits of the nearest float16 (half to even, overflow to infinity), as int32
    below 65536.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    rounded = (size + 0xFFF + ((size >> 13) & 1)) >> 13
    normal = jnp.minimum(rounded - (112 << 10), 0x7C00)
    small = round_half_even(lax.bitcast_convert_type(size, jnp.float32) * 2.0**24).astype(jnp.int32)
    half = jnp.where(size < (113 << 23), small, normal)
    return sign | jnp.where(size > 0x7F800000, 0x7E00, half)
