"""One direction for the vectors of two layers and their norms (MiniCache, arXiv:2405.14366)."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import Array, lax

from .codec import Codec
from .formats import KVFormat
from .scales import as_half, length, scale_bits, scale_of

SMALL = 1e-3  # sines below which SLERP becomes a line: float32 knows angles from cosines no better


@dataclass(frozen=True)
class Shared(Codec):
    """Codec of one tensor (K or V) of two layers: `inner` keeps the direction half-way between
    both, metadata the two norms (`scales`).

    A block that is encoded is `[..., 2 * head_dim, T]`, the channels of the first layer above those
    of the second. What is decoded `[..., head_dim, T]` is the vector of one of them.

    Attributes:
        inner: codec of the direction.
        t: where on the arc from the first layer's direction to the second's it lies, from 0 to 1.
        reads: 0 or 1, int or int32 []: the layer whose vectors are decoded.
    """

    inner: Codec
    t: float
    reads: int | Array = 0

    def for_block(self, head_dim: int, tokens: int) -> "Shared":
        """See `Codec.for_block`."""
        return replace(self, inner=self.inner.for_block(head_dim, tokens))

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        return self.inner.rows(head_dim)

    @property
    def meta_rows(self) -> int:
        """float16 metadata rows of one block: those of `inner`, then both norms."""
        return self.inner.meta_rows + 2

    def encode(self, x: Array) -> tuple[Array, Array]:
        """`[..., 2 * head_dim, T]` to (payload, metadata)."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-2)
        norms = (as_half(scale_bits(length(layer, -2))) for layer in (first, second))
        payload, meta = self.inner.encode(between(first, second, self.t))
        return payload, jnp.concatenate([meta, *norms], axis=-2)

    def decode(self, payload: Array, meta: Array) -> Array:
        """Norm times direction, float32 `[..., head_dim, T]`."""
        inner, norm = self._split(meta)
        return self.inner.decode(payload, inner) * norm

    def key_logits(self, q: Array, payload: Array, meta: Array) -> Array:
        """`q [..., G, d]` times the decoded block, `[..., G, T]`."""
        inner, norm = self._split(meta)
        return self.inner.key_logits(q, payload, inner) * norm

    def value_mix(self, p: Array, payload: Array, meta: Array, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the decoded block, `[..., G, d]`; tokens not `valid [...,
        T]` are never read.
        """
        inner, norm = self._split(meta)
        weights = p * jnp.where(valid[..., None, :], norm, 0)
        return self.inner.value_mix(weights, payload, inner, valid)

    def _split(self, meta: Array) -> tuple[Array, Array]:
        """Metadata of `inner`, and the layer's norms float32 `[..., 1, T]`."""
        norm = lax.dynamic_slice_in_dim(meta, self.inner.meta_rows + self.reads, 1, axis=-2)
        return meta[..., : self.inner.meta_rows, :], scale_of(norm)


def shared_format(fmt: KVFormat, t: float) -> KVFormat:
    """How tokens of two layers are stored as one: directions as `fmt` stores one layer's tokens, at
    `t` between both layers.
    """
    return KVFormat(Shared(fmt.key, t), Shared(fmt.value, t), name=f"shared {fmt.name}")


def read_by(fmt: KVFormat, which: int | Array) -> KVFormat:
    """A shared format as the first (0) or second (1) of the layers reads it; others as they are."""
    key, value = (
        replace(codec, reads=which) if isinstance(codec, Shared) else codec
        for codec in (fmt.key, fmt.value)
    )
    return replace(fmt, key=key, value=value)


def between(x: Array, y: Array, t: float) -> Array:
    """Unit vector at `t` on the arc between the directions of `x` and `y [..., d, T]` (SLERP).

    On the line between the two where they are parallel or opposite.
    """
    x, y = _unit(x), _unit(y)
    omega = angle(x, y)
    sine = jnp.sin(omega)
    on_arc = sine > SMALL
    sine = jnp.where(on_arc, sine, 1.0)
    to_x = jnp.where(on_arc, jnp.sin((1 - t) * omega) / sine, 1 - t)
    to_y = jnp.where(on_arc, jnp.sin(t * omega) / sine, t)
    return _unit(to_x * x + to_y * y)


def angle(x: Array, y: Array) -> Array:
    """Angle in radians of `x` and `y [..., d, T]`, float32 `[..., 1, T]`; right where one is 0."""
    return jnp.arccos(jnp.clip((_unit(x) * _unit(y)).sum(axis=-2, keepdims=True), -1.0, 1.0))


def _unit(x: Array) -> Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(length(x, -2), 1e-30)
