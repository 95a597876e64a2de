"""The identity codec: a tensor in a floating type, as byte planes that fit the same pages."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from .codec import without_meta
from .halves import float_to_half, half_to_float
from .tiles import Scalar, Tile

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Full(Scalar):
    """Codec of one tensor (K or V) kept exactly in `dtype`. Byte plane `i` (rows `i * d` to `(i +
    1) * d`) holds byte `i` of each value.
    """

    dtype: str

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be float32, bfloat16 or float16")

    @property
    def _bytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        return head_dim * self._bytes

    @property
    def native(self) -> tuple[int, int]:
        """See `Codec.native`."""
        return {"bfloat16": 16, "float16": 17, "float32": 32}[self.dtype], 1

    def encode(self, x: Array) -> tuple[Array, Array]:
        """`[..., d, T]` to (payload uint8 `[..., rows, T]`, empty metadata)."""
        planes = jax.lax.bitcast_convert_type(x.astype(self.dtype), jnp.uint8)  # [..., d, T, bytes]
        payload = jnp.moveaxis(planes, -1, -3).reshape(*x.shape[:-2], -1, x.shape[-1])
        return payload, without_meta(x)

    def decode(self, payload: Array, meta: Array) -> Array:
        """Back to float32 `[..., d, T]`."""
        del meta
        planes = payload.reshape(*payload.shape[:-2], self._bytes, -1, payload.shape[-1])
        planes = jnp.moveaxis(planes, -3, -1)
        x = jax.lax.bitcast_convert_type(planes, jnp.dtype(self.dtype))
        return x.astype(jnp.float32)

    def tile(self, head_dim: int, channel: int, channels: int) -> Tile:
        """A plane for each byte."""
        rows = tuple(channel + byte * head_dim for byte in range(self._bytes))
        return Tile(channel, channels, rows, None, None, self._from_bytes)

    def encode_tiles(
        self, tiles: Sequence[Tile], values: Sequence[Array]
    ) -> tuple[list[Array], dict[int, Array]]:
        """The bits of each value as int32 (upper half zero for 16-bit types); no metadata."""
        del tiles
        return [self._to_bits(x) for x in values], {}

    def pack_tiles(self, tiles: Sequence[Tile], codes: Sequence[Array]) -> dict[int, Array]:
        """Bits of all tiles to `{first payload row: bytes int32 [channels, T]}`, each row once."""
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
