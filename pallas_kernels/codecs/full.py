"""The identity codec: a tensor kept in a floating type, stored as byte planes so that it fits the same pages."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Full:
    """Codec of one tensor (K or V) kept exactly in `dtype`. Byte plane `i` (rows `i * d` to `(i + 1) * d`) holds byte `i` of each value."""

    dtype: str

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r} must be float32, bfloat16 or float16")

    @property
    def _bytes(self) -> int:
        return jnp.dtype(self.dtype).itemsize

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
        return jax.lax.bitcast_convert_type(jnp.moveaxis(planes, -3, -1), jnp.dtype(self.dtype)).astype(jnp.float32)

    def key_logits(self, q: Array, payload: Array, meta: Array) -> Array:
        """`q [..., G, d]` times the block, `[..., G, T]`."""
        return jnp.einsum("...Gc,...ct->...Gt", q, self.decode(payload, meta))

    def value_mix(self, p: Array, payload: Array, meta: Array, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the block, `[..., G, d]`; tokens not `valid [..., T]` are never read."""
        values = jnp.where(valid[..., None, :], self.decode(payload, meta), 0)
        return jnp.einsum("...Gt,...ct->...Gc", p, values)
