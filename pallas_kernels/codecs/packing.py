"""Plane packing of sub-byte codes along channels.

A `b`-bit tensor of `d` channels has `n = 8 / b` planes. Byte row `r` holds channels `r, r + d/n, r
+ 2d/n, ...`, the lowest plane in the lowest bits. Unpacking is a shift and a mask of whole rows,
and each plane is a plain matrix. Three bits are the rows of the lower two, then those of the upper
one.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array, lax

from .tiles import Tile


def packed_rows(bits: int, head_dim: int) -> int:
    """Byte rows that `head_dim` channels of `bits`-bit codes take."""
    return head_dim * bits // 8


def fills_bytes(bits: int, codes: int) -> bool:
    """Whether so many codes of so many bits fill rows of bytes."""
    return codes % (8 if bits == 3 else 8 // bits) == 0


def pack_planes(codes: Array, bits: int) -> Array:
    """Pack codes `[..., d, T]` (integers below `2**bits`) as uint8 `[..., d * bits / 8, T]`."""
    if bits == 3:
        return jnp.concatenate([pack_planes(codes & 3, 2), pack_planes(codes >> 2, 1)], axis=-2)
    planes = jnp.split(codes.astype(jnp.uint8), 8 // bits, axis=-2)
    packed = planes[0]
    for i, plane in enumerate(planes[1:], start=1):
        packed = packed | (plane << (i * bits))
    return packed


def unpack_planes(packed: Array, bits: int) -> Array:
    """Unpack rows of bytes `[..., d * bits / 8, T]` into codes `[..., d, T]` of their type."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = jnp.split(packed, [packed.shape[-2] // 3 * 2], axis=-2)
        return unpack_planes(low, 2) | (unpack_planes(high, 1) << 2)
    mask = jnp.uint8(2**bits - 1)
    return jnp.concatenate([(packed >> (i * bits)) & mask for i in range(8 // bits)], axis=-2)


def code_of(number: Array, bits: int, codes: int, byte: Callable[[Array], Array]) -> Array:
    """Codes int32 `[m, n]` of the numbers `[m]` out of `codes` packed ones; `byte` reads payload
    rows `[m]` as int32 `[m, n]`.
    """
    if bits == 3:
        upper = code_of(number, 1, codes, lambda row: byte(packed_rows(2, codes) + row))
        return code_of(number, 2, codes, byte) | upper << 2
    rows = jnp.int32(packed_rows(bits, codes))
    return (byte(lax.rem(number, rows)) >> (lax.div(number, rows) * bits)[:, None]) & (2**bits - 1)


def pack_tiles(tiles: Sequence[Tile], codes: Sequence[Array], bits: int) -> dict[int, Array]:
    """Codes int32 `[channels, T]` of all tiles to `{first payload row: bytes}`, each row once."""
    width, packed = packed_rows(bits, tiles[-1].channel + tiles[-1].channels), {}
    for tile, code in zip(tiles, codes, strict=True):
        (row,) = tile.rows
        shifted = code << (tile.channel // width * bits)
        packed[row] = packed[row] | shifted if row in packed else shifted
    return packed
