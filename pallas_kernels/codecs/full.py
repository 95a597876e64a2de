"""The identity codec: a tensor kept in a floating type, stored as byte planes so that it fits the
same pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from .halves import float_to_half, half_to_float
from .tiles import Tile, cut_points

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Full:
    """Codec of one tensor (K or V) kept exactly in `dtype`. Byte plane `i` (rows `i * d` to `(i +
    1) * d`) holds byte `i` of each value.
    """

    dtype: str

    in_kernels = in_decode_kernels = True  # and not in plain XLA only
    separable = True  # a token's lane stands for itself

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be float32, bfloat16 or float16")

    @property
    def _bytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def for_block(self, head_dim: int, tokens: int) -> "Full":
        """Itself: rows depend on `head_dim` alone."""
        del head_dim, tokens
        return self

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        return head_dim * self._bytes

    @property
    def meta_rows(self) -> int:
        """No metadata."""
        return 0

    def encode(self, x: Array) -> tuple[Array, Array]:
        """`[..., d, T]` to (payload uint8 `[..., rows, T]`, empty metadata)."""
        planes = jax.lax.bitcast_convert_type(x.astype(self.dtype), jnp.uint8)  # [..., d, T, bytes]
        payload = jnp.moveaxis(planes, -1, -3).reshape(*x.shape[:-2], -1, x.shape[-1])
        return payload, jnp.zeros((*x.shape[:-2], 0, x.shape[-1]), jnp.float16)

    def decode(self, payload: Array, meta: Array) -> Array:
        """Back to float32 `[..., d, T]`."""
        del meta
        planes = payload.reshape(*payload.shape[:-2], self._bytes, -1, payload.shape[-1])
        return jax.lax.bitcast_convert_type(
            jnp.moveaxis(planes, -3, -1), jnp.dtype(self.dtype)
        ).astype(jnp.float32)

    def key_logits(self, q: Array, payload: Array, meta: Array) -> Array:
        """`q [..., G, d]` times the block, `[..., G, T]`."""
        return jnp.einsum("...Gc,...ct->...Gt", q, self.decode(payload, meta))

    def value_mix(self, p: Array, payload: Array, meta: Array, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the block, `[..., G, d]`; tokens not `valid [..., T]` are
        never read.
        """
        values = jnp.where(valid[..., None, :], self.decode(payload, meta), 0)
        return jnp.einsum("...Gt,...ct->...Gc", p, values)

    def plane_channels(self, head_dim: int) -> int:
        """Channels that one byte plane holds: all."""
        return head_dim

    scale_groups = 1  # one cut of the channels: there is no scale

    def tiles(self, head_dim: int, *others) -> tuple[Tile, ...]:
        """The tiles of a block, cut so that the blocks of the codecs `others` have the same
        channels in theirs.
        """
        points = cut_points(head_dim, (self, *others))
        return tuple(
            Tile(
                a,
                b - a,
                tuple(a + byte * head_dim for byte in range(self._bytes)),
                None,
                None,
                self._from_bytes,
            )
            for a, b in zip(points, points[1:], strict=False)
        )

    def encode_tiles(
        self, tiles: Sequence[Tile], values: Sequence[Array]
    ) -> tuple[list[Array], dict[int, Array]]:
        """The bits of each value as int32 (upper half zero for 16-bit types), same shapes; no
        metadata.
        """
        del tiles
        return [self._to_bits(x) for x in values], {}

    def pack_tiles(self, tiles: Sequence[Tile], codes: Sequence[Array]) -> dict[int, Array]:
        """Bits of all tiles to `{first payload row: bytes int32 [channels, T]}`, every payload row
        once.
        """
        return {
            row: (code >> (8 * byte)) & 255
            for tile, code in zip(tiles, codes, strict=True)
            for byte, row in enumerate(tile.rows)
        }

    def _from_bytes(self, planes: Sequence[Array]) -> Array:
        if self.dtype == "bfloat16":
            return jax.lax.bitcast_convert_type((planes[1] << 24) | (planes[0] << 16), jnp.float32)
        if self.dtype == "float16":
            return half_to_float((planes[1] << 8) | planes[0])
        return jax.lax.bitcast_convert_type(
            (planes[3] << 24) | (planes[2] << 16) | (planes[1] << 8) | planes[0], jnp.float32
        )

    def _to_bits(self, x: Array) -> Array:
        if self.dtype == "float16":
            return float_to_half(x)
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        if self.dtype == "float32":
            return bits
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF
        return jnp.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
