"""Tiles: the pieces in which kernels read and write a block, so that they never slice, join or reshape a value.

A tile is a range of channels of one tensor that shares a byte plane and a group; every codec cuts its blocks into tiles with
`codec.tiles(head_dim)`. The functions of a tile work on plain arrays `[channels, T]`, so the Triton and the TPU kernels inline them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax


@dataclass(frozen=True)
class Tile:
    """Channels `[channel, channel + channels)` of one tensor (K or V) of a block.

    `rows`: the first payload row of each byte plane that the tile reads, `channels` rows each (one plane, or one a byte for exact types);
    none where codes are looked up in a learned table (`packing.code_of`).
    `scale_row`, `zero_row`: metadata rows of scale and zero point, None where there is none: the value is `scale * code + zero`.
    """

    channel: int
    channels: int
    rows: tuple[int, ...]
    scale_row: int | None
    zero_row: int | None
    unpack: Callable[[Sequence[Array]], Array]  # byte planes int32 [channels, T] -> float32 codes [channels, T]

    def value(self, codes: Array, number: Callable[[int], Array]) -> Array:
        """The values float32 `[channels, T]` of codes; `number(row)` reads a metadata row as float32 `[T]`."""
        if self.scale_row is None:
            return codes
        scaled = number(self.scale_row)[None, :] * codes
        return scaled if self.zero_row is None else scaled + number(self.zero_row)[None, :]


def cut_points(head_dim: int, codecs: Iterable) -> tuple[int, ...]:
    """Channel boundaries 0 ... head_dim at which every plane and group of all `codecs` begins, the same within every plane."""
    codecs, points = tuple(codecs), {0}
    while True:
        more = set(points)
        for codec in codecs:
            width, group = codec.plane_channels(head_dim), head_dim // codec.scale_groups
            inside = {c % width for c in more} | {c % width for c in range(0, head_dim, group)}
            more |= {plane + c for plane in range(0, head_dim, width) for c in inside}
        if more == points:
            return (*sorted(points), head_dim)
        points = more


def round_half_even(x: Array) -> Array:
    """`round` for backends that lack it; x float32, below 2**22 in size."""
    up = jnp.floor(x + 0.5)
    odd = up - 2.0 * jnp.floor(up * 0.5)
    return up - jnp.where(up - x == 0.5, odd, 0.0)


def half_to_float(bits: Array) -> Array:
    """float16 given as its 16 bits (int32, upper half ignored) to float32, by integer arithmetic: for backends without float16."""
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    normal = lax.bitcast_convert_type(((exponent + 112) << 23) | (fraction << 13), jnp.float32)
    special = lax.bitcast_convert_type((255 << 23) | (fraction << 13), jnp.float32)
    small = fraction.astype(jnp.float32) * 2.0**-24
    size = jnp.where(exponent == 0, small, jnp.where(exponent == 31, special, normal))
    return jnp.where((bits >> 15) & 1 == 1, -size, size)


def float_to_half(x: Array) -> Array:
    """float32 to the 16 bits of the nearest float16 (half to even, overflow to infinity), as int32 below 65536."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    sign, size = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    rounded = (size + 0xFFF + ((size >> 13) & 1)) >> 13
    normal = jnp.minimum(rounded - (112 << 10), 0x7C00)
    small = round_half_even(lax.bitcast_convert_type(size, jnp.float32) * 2.0**24).astype(jnp.int32)
    half = jnp.where(size < (113 << 23), small, normal)
    return sign | jnp.where(size > 0x7F800000, 0x7E00, half)
