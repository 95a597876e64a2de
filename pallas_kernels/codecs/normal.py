"""Scalar quantisation with a normal variable's best levels (TurboQuant, arXiv:2504.19874)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import jax.numpy as jnp
from jax import Array

from .packing import pack_planes, pack_tiles, packed_rows, unpack_planes
from .scales import as_half, scale_bits, scale_of, unit_of
from .tiles import Scalar, Tile

# The positive half of the Lloyd-Max levels of N(0, 1), rounded to bfloat16: kernels multiply levels
# as exactly as integer codes.
LEVELS = {
    1: (0.796875,),
    2: (0.453125, 1.5078125),
    4: (0.1279296875, 0.388671875, 0.65625, 0.94140625, 1.2578125, 1.6171875, 2.0625, 2.734375),
}


@dataclass(frozen=True)
class Normal(Scalar):
    """Codec of one tensor (K or V) whose channels look like draws of one normal distribution, as
    they do once rotated: one scale a token.

    A code is the number of a level of N(0, 1), its top bit the sign. The paper stores the token's
    norm and reads `norm / sqrt(d) * level`; here the stored scale is `norm / |levels of the token's
    codes|`, so that the norm is kept exactly: codes alone shrink it, which flattens attention. A
    block is `[..., head_dim, T]`, its payload uint8 `[..., rows, T]`, its metadata float16 `[...,
    1, T]`, as `scales` keeps it.
    """

    bits: int

    def __post_init__(self):
        if self.bits not in LEVELS:
            raise ValueError(
                f"bits={self.bits} must be one of {tuple(LEVELS)} for levels of the normal "
                "distribution"
            )

    @property
    def meta_rows(self) -> int:
        """The scale."""
        return 1

    @property
    def native(self) -> tuple[int, int]:
        """See `Codec.native`."""
        return 64 + self.bits, 1

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        if (head_dim * self.bits) % 8:
            raise ValueError(
                f"head_dim={head_dim} must be a multiple of {8 // self.bits}, the channels in a "
                f"byte at {self.bits} bits"
            )
        return packed_rows(self.bits, head_dim)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Quantise `[..., d, T]` to (payload, metadata): the nearest levels to `x / rms(x)`."""
        (codes,), meta = self.encode_tiles((), [x.astype(jnp.float32)])
        return pack_planes(codes, self.bits), as_half(meta[0])[..., None, :]

    def decode(self, payload: Array, meta: Array) -> Array:
        """Dequantise to float32 `[..., d, T]`: `scale * level` with the stored scale."""
        return scale_of(meta) * self._levels(payload)

    def key_logits(self, q: Array, payload: Array, meta: Array) -> Array:
        """`q [..., G, d]` times the decoded block, `[..., G, T]`; the scale outside the product."""
        return jnp.einsum("...Gc,...ct->...Gt", q, self._levels(payload)) * scale_of(meta)

    def value_mix(self, p: Array, payload: Array, meta: Array, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the decoded block, `[..., G, d]`; tokens not `valid [...,
        T]` are never read.
        """
        scale = jnp.where(valid[..., None, :], scale_of(meta), 0)
        return jnp.einsum("...Gt,...ct->...Gc", p * scale, self._levels(payload))

    def plane_channels(self, head_dim: int) -> int:
        """Channels that one byte plane holds."""
        return self.rows(head_dim)

    def tile(self, head_dim: int, channel: int, channels: int) -> Tile:
        """One plane of codes, scaled by the token's scale."""
        width = self.plane_channels(head_dim)
        unpack = partial(_plane, shift=channel // width * self.bits, bits=self.bits)
        return Tile(channel, channels, (channel % width,), 0, None, unpack)

    def encode_tiles(
        self, tiles: Sequence[Tile], values: Sequence[Array]
    ) -> tuple[list[Array], dict[int, Array]]:
        """`encode` tile by tile: float32 `[..., channels, T]` to codes (int32, same shapes) and
        `{metadata row: bits int32 [..., T]}`.
        """
        del tiles
        unit, inverse = unit_of(reduce(jnp.maximum, (jnp.abs(x).max(axis=-2) for x in values)))
        values = [x * inverse[..., None, :] for x in values]  # squares neither overflow nor vanish
        squares = sum((x * x).sum(axis=-2) for x in values)
        to_rms = jnp.where(squares > 0, jnp.sqrt(sum(x.shape[-2] for x in values) / squares), 0.0)
        pairs = (_nearest(x * to_rms[..., None, :], self.bits) for x in values)
        codes, squared_levels = zip(*pairs, strict=True)
        scale = unit * jnp.sqrt(squares / sum(x.sum(axis=-2) for x in squared_levels))
        return list(codes), {0: scale_bits(scale)}

    def pack_tiles(self, tiles: Sequence[Tile], codes: Sequence[Array]) -> dict[int, Array]:
        """Codes of all tiles to `{first payload row: bytes int32 [channels, T]}`, each row once."""
        return pack_tiles(tiles, codes, self.bits)

    def _levels(self, payload: Array) -> Array:
        return _level(unpack_planes(payload, self.bits).astype(jnp.int32), self.bits)


def _nearest(x: Array, bits: int) -> tuple[Array, Array]:
    """Codes int32 of the levels nearest to `x`, and the squares of those levels."""
    size, levels, code = jnp.abs(x), LEVELS[bits], jnp.where(x < 0, 1 << (bits - 1), 0)
    square = jnp.full(x.shape, levels[0] ** 2, jnp.float32)
    for low, high in zip(levels, levels[1:], strict=False):
        above = size > (low + high) / 2
        code, square = jnp.where(above, code + 1, code), jnp.where(above, high**2, square)
    return code, square


def _level(code: Array, bits: int) -> Array:
    """Float32 levels of int32 codes by halving the table bit by bit; higher bits do not matter."""
    levels = [jnp.float32(level) for level in LEVELS[bits]]
    for bit in range(bits - 1):
        odd, pairs = (code >> bit) & 1 == 1, zip(levels[::2], levels[1::2], strict=True)
        levels = [jnp.where(odd, high, low) for low, high in pairs]
    return jnp.where((code >> (bits - 1)) & 1 == 1, -levels[0], levels[0])


def _plane(planes: Sequence[Array], shift: int, bits: int) -> Array:
    return _level(planes[0] >> shift, bits)
