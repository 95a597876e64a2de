"""A codec's error of a block as two narrow matrices' product (GEAR, arXiv:2403.05527 sec. 3)."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from . import scales
from .codec import Beside, Codec
from .halves import float_to_half
from .lanes import apart, as_rows, from_rows, rows_for, side_by_side

ITERATIONS = 3
FAR = 2.0**12


@dataclass(frozen=True)
class LowRank(Beside):
    """`codec` and the error E = x - decode(encode(x)) of a block as Q P^T of `rank`, Q `[T, rank]`
    and P `[d, rank]` in float16.

    Q has orthonormal columns. Where float16 does not hold a column of P, that one is in bfloat16
    and its column of Q is `FAR` times as large, which says so: no number of the others reaches 2.

    Rows: the payload is the codec's; its metadata first, then Q, lane t for token t, then P
    (`lanes.as_rows`). Plain XLA runs it.
    """

    codec: Codec
    rank: int
    head_dim: int = 0  # given by `for_block`
    tokens: int = 0

    separable = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} of the error must be at least 1")

    def for_block(self, head_dim: int, tokens: int) -> Codec:
        """The codec of blocks `[head_dim, tokens]`."""
        if not 1 <= self.rank <= min(head_dim, tokens):
            raise ValueError(
                f"rank={self.rank} must be at least 1 and at most that of a block of {head_dim} "
                f"channels and {tokens} tokens"
            )
        return super().for_block(head_dim, tokens)

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        return self.codec.rows(head_dim)

    @property
    def meta_rows(self) -> int:
        """float16 metadata rows of one block."""
        return self.codec.meta_rows + self.rank + rows_for(self.head_dim * self.rank, self.tokens)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """`[..., d, T]` to uint8 `[..., rows, T]` and metadata float16 `[..., meta_rows, T]`."""
        payload, meta = self.codec.encode(x)
        by_token, by_channel = nearest(
            jnp.swapaxes(x.astype(jnp.float32) - self.codec.decode(payload, meta), -1, -2),
            self.rank,
        )
        largest = jnp.abs(by_channel).max(axis=-2, keepdims=True)  # [..., 1, rank]
        far = scales.needs_wide(largest)
        by_token = jnp.where(far, FAR * by_token, by_token).astype(jnp.float16)
        narrow, wide = float_to_half(by_channel), scales.nearest_bfloat16(by_channel / FAR)
        numbers = [
            jnp.swapaxes(by_token, -1, -2),
            as_rows(scales.as_half(jnp.where(far, wide, narrow)), self.tokens),
        ]
        return payload, jnp.concatenate([meta, *numbers], axis=-2)

    def decode(self, payload: Array, meta: Array) -> Array:
        """Back to float32 `[..., d, n * T]`, of one block or n that lie side by side."""
        payload, meta = apart(payload, self.tokens), apart(meta, self.tokens)
        inner, numbers = meta[..., : self.codec.meta_rows, :], meta[..., self.codec.meta_rows :, :]
        by_token = numbers[..., : self.rank, :].astype(jnp.float32)
        far = jnp.swapaxes(jnp.abs(by_token).max(axis=-1, keepdims=True) > 2, -1, -2)  # [..., 1, r]
        by_channel = scales.either(
            from_rows(numbers[..., self.rank :, :], self.head_dim, self.rank), far
        )
        return side_by_side(self.codec.decode(payload, inner) + by_channel @ by_token)


def nearest(error: Array, rank: int) -> tuple[Array, Array]:
    """Q `[..., T, rank]`, orthonormal columns, and P `[..., d, rank]`: Q P^T is near the best.

    Three power iterations on `error [..., T, d]` from a fixed start, orthonormal in the last one
    (GEAR, algorithm 2).
    """
    unit, inverse = scales.unit_of(jnp.abs(error).max(axis=(-1, -2), keepdims=True))
    error = error * inverse  # its fourth powers neither overflow nor vanish
    p = jnp.asarray(np.random.default_rng(0).uniform(size=(error.shape[-1], rank)), jnp.float32)
    p = jnp.broadcast_to(p, (*error.shape[:-2], *p.shape))
    back = jnp.swapaxes(error, -1, -2)
    for _ in range(ITERATIONS - 1):
        p = back @ (error @ p)
    q = _orthonormal(error @ _orthonormal(p))
    return q, back @ q * unit


def _orthonormal(x: Array) -> Array:
    """`x [..., n, rank]` with orthonormal columns of the same span; one that adds nothing is 0.

    Gram-Schmidt, each projection taken off twice. With LAPACK's QR the prompts of ten requests
    never came back on two cores (jaxlib 0.10.2; docs/log.md).
    """
    columns: list[Array] = []
    for i in range(x.shape[-1]):
        column = x[..., i]
        least = 1e-6 * jnp.linalg.norm(column, axis=-1, keepdims=True)
        for before in columns * 2:
            column = column - (before * column).sum(axis=-1, keepdims=True) * before
        norm = jnp.linalg.norm(column, axis=-1, keepdims=True)
        columns.append(jnp.where(norm > least, column / jnp.where(norm > least, norm, 1.0), 0.0))
    return jnp.stack(columns, axis=-1)
