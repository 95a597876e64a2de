"""Uniform asymmetric quantisation per channel over a block (KIVI, arXiv:2402.02750, sec. 3.2)."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from . import scales
from .codec import Codec
from .lanes import apart, as_rows, from_rows, rows_for, side_by_side
from .packing import pack_planes, unpack_planes
from .uniform import BITS, Uniform


@dataclass(frozen=True)
class PerChannel(Codec):
    """Codec of one tensor: `bits` a channel, a scale and zero point a channel for the T tokens.

    Keys have a few large channels; a group along the tokens keeps their range from the others. The
    metadata is `2 * head_dim` float16 numbers (`scales`), all scales first, in rows of T lanes
    (`lanes.as_rows`). A block is encoded as a whole. Plain XLA runs it.
    """

    bits: int
    head_dim: int = 0  # given by `for_block`
    tokens: int = 0

    separable = False

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} must be one of {BITS}")

    def for_block(self, head_dim: int, tokens: int) -> "PerChannel":
        """The codec of blocks `[head_dim, tokens]`."""
        return dataclasses.replace(self, head_dim=head_dim, tokens=tokens)

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        return Uniform(self.bits).rows(head_dim)

    @property
    def meta_rows(self) -> int:
        """float16 metadata rows of one block."""
        return rows_for(2 * self.head_dim, self.tokens)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Quantise `[..., d, T]` to (payload, metadata), half to even, with `scales.grid`."""
        x = x.astype(jnp.float32)
        low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
        scale, zero, *stored = scales.grid(low, high, 2**self.bits - 1)
        codes = jnp.round((x - zero) / jnp.where(scale > 0, scale, 1.0))
        codes = jnp.clip(codes, 0, 2**self.bits - 1)
        numbers = scales.as_half(jnp.concatenate(stored, axis=-2))  # [..., 2 * d, 1]
        return pack_planes(codes, self.bits), as_rows(numbers, self.tokens)

    def decode(self, payload: Array, meta: Array) -> Array:
        """`scale * code + zero`, float32 `[..., d, n * T]`, of one block or n side by side."""
        payload, meta = apart(payload, self.tokens), apart(meta, self.tokens)
        numbers = from_rows(meta, 2 * self.head_dim, 1)
        scale, zero = numbers[..., : self.head_dim, :], numbers[..., self.head_dim :, :]
        codes = unpack_planes(payload, self.bits).astype(jnp.float32)
        return side_by_side(scales.scale_of(scale) * codes + scales.zero_of(scale, zero))
