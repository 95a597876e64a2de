"""What codecs that plain XLA runs have in common: its attention reads the decoded block."""

from abc import ABC, abstractmethod

import jax.numpy as jnp
from jax import Array


class PlainXLA(ABC):
    """A codec whose products are taken with what `decode` gives. Frozen dataclasses derive from
    it.
    """

    in_kernels = False  # the native, Triton and TPU kernels do not know it
    in_decode_kernels = False  # nor does their decode attention
    separable = True  # a token's lane can be moved, dropped or overwritten without touching others

    @abstractmethod
    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""

    @property
    @abstractmethod
    def meta_rows(self) -> int:
        """float16 metadata rows of one block."""

    @abstractmethod
    def encode(self, x: Array) -> tuple[Array, Array]:
        """A block `[..., d, T]` to payload uint8 `[..., rows, T]` and metadata float16 `[...,
        meta_rows, T]`.
        """

    @abstractmethod
    def decode(self, payload: Array, meta: Array) -> Array:
        """Back to float32 `[..., d, n * T]`, of one block or n that lie side by side."""

    def for_block(self, head_dim: int, tokens: int) -> "PlainXLA":
        """The codec of blocks `[head_dim, tokens]`; itself where it does not depend on them."""
        del head_dim, tokens
        return self

    def key_logits(self, q: Array, payload: Array, meta: Array) -> Array:
        """`q [..., G, d]` times the decoded block, `[..., G, T]`."""
        return jnp.einsum("...Gc,...ct->...Gt", q, self.decode(payload, meta))

    def value_mix(self, p: Array, payload: Array, meta: Array, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the decoded block, `[..., G, d]`; tokens not `valid [...,
        T]` count as zeros.
        """
        values = jnp.where(valid[..., None, :], self.decode(payload, meta), 0)
        return jnp.einsum("...Gt,...ct->...Gc", p, values)
