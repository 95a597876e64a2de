"""Vector quantisation of neighbouring channels, learned codebooks (CQ, arXiv:2405.03917)."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jax import Array, lax

from .codec import Fitting, without_meta
from .packing import fills_bytes, pack_planes, packed_rows, unpack_planes
from .scales import unit_of
from .tiles import Tile, Tiled, looked_up

BITS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Coupled(Tiled):
    """Codec of one tensor (K or V): `channels` contiguous channels become one code of `bits` bits,
    a row of their codebook.

    A block is `[B, ..., head_dim, T]`; its payload is uint8 `[B, ..., rows, T]`, and there is no
    metadata. `table` float16 or bfloat16 `[B, head_dim / channels, 2**bits, channels]` holds the
    codebooks of the `B` heads (`with_table` sets it).
    """

    bits: int
    channels: int
    table: Array | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(
                f"bits={self.bits} of a coupled code must be one of {BITS}, which pack into bytes"
            )
        if self.channels < 1:
            raise ValueError(f"channels={self.channels} that share a code must be at least 1")

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        if head_dim % self.channels or not fills_bytes(self.bits, head_dim // self.channels):
            raise ValueError(
                f"head_dim={head_dim} must be a multiple of channels={self.channels}, and its "
                f"codes of {self.bits} bits must fill bytes; choose another number of channels"
            )
        return packed_rows(self.bits, head_dim // self.channels)

    @property
    def native(self) -> tuple[int, int]:
        """See `Codec.native`."""
        return 128 + self.bits, self.channels

    @property
    def learned(self) -> bool:
        """It is."""
        return True

    def table_shape(self, head_dim: int) -> tuple[int, ...]:
        """Shape of one head's table."""
        return head_dim // self.channels, 2**self.bits, self.channels

    def encode(self, x: Array) -> tuple[Array, Array]:
        """`[B, ..., d, T]` to (codes of the nearest rows, of equals the first; empty metadata)."""
        tokens = jnp.swapaxes(x.astype(jnp.float32), -1, -2)  # [B, ..., T, d]
        vectors = tokens.reshape(x.shape[0], -1, x.shape[-2] // self.channels, self.channels)
        by_group = jnp.moveaxis(vectors, 2, 0), jnp.moveaxis(self._codebooks(), 1, 0)
        codes = lax.map(lambda one: nearest(*one), by_group)  # [groups, B, n], one by one
        codes = jnp.moveaxis(codes, 0, 2).reshape(*tokens.shape[:-1], -1)
        return pack_planes(jnp.swapaxes(codes, -1, -2), self.bits), without_meta(x)

    def decode(self, payload: Array, meta: Array) -> Array:
        """Back to float32 `[B, ..., d, T]`: the rows of the codebooks."""
        del meta
        codes = jnp.swapaxes(unpack_planes(payload, self.bits), -1, -2)  # [B, ..., T, groups]
        by_group = jnp.swapaxes(codes.reshape(payload.shape[0], -1, codes.shape[-1]), 1, 2)
        index = by_group.astype(jnp.int32)[..., None]
        vectors = jnp.take_along_axis(self._codebooks(), index, axis=2)  # [B, groups, n, channels]
        tokens = jnp.swapaxes(vectors, 1, 2).reshape(*codes.shape[:-1], -1)
        return jnp.swapaxes(tokens, -1, -2)

    def tile(self, head_dim: int, channel: int, channels: int) -> Tile:
        """Codes that are looked up; no scale."""
        del head_dim
        return Tile(channel, channels, (), None, None, looked_up)

    def fit(self, x: Array, fisher: Array, key: Array, how: Fitting) -> Array:
        """The weight of a vector of channels is the squared norm of its gradient."""
        heads, d, n = x.shape
        # [K * groups, n, channels]
        by_group = (jnp.swapaxes(part.reshape(-1, self.channels, n), 1, 2) for part in (x, fisher))
        vectors, weight = by_group
        centroids = how.kmeans(vectors, weight.sum(axis=-1), key, 2**self.bits)
        return centroids.reshape(heads, *self.table_shape(d))

    def _codebooks(self) -> Array:
        assert self.table is not None, (
            "a learned codec works once `with_table` has given it its layer's tables"
        )
        return self.table.astype(jnp.float32)


def nearest(x: Array, codebook: Array) -> Array:
    """Index int32 `[..., n]` of the row of `codebook [..., m, c]` nearest `x [..., n, c]`."""
    _, inverse = unit_of(jnp.abs(codebook).max(axis=(-1, -2), keepdims=True))
    x, codebook = x * inverse, codebook * inverse  # squares neither overflow nor vanish
    product = jnp.einsum("...nc,...mc->...nm", x, codebook, precision=lax.Precision.HIGHEST)
    return jnp.argmin(jnp.square(codebook).sum(axis=-1)[..., None, :] - 2 * product, axis=-1)
