"""The format of multi-head latent attention's one key a token (arXiv:2405.04434)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from .formats import Block, KVFormat
from .full import Full


@dataclass(frozen=True)
class LatentFormat(KVFormat):
    """`key` is the codec of the latent (the first `rank` channels), `value` of the rotary part.

    A `Block` has the two in the places of K and V, and V has no channels. Plain XLA only: the
    kernels take a V of K's width from the pages.
    """

    rank: int = 0

    @staticmethod
    def of(fmt: KVFormat, rank: int, dtype: str) -> "LatentFormat":
        """The latent at the codec of `fmt`, the rotary part in `dtype`.

        Raises:
            ValueError: `fmt` keeps K and V differently.
        """
        if fmt.key != fmt.value:
            raise ValueError(
                f"format {fmt.name!r} keeps keys and values differently, and this model has one "
                "latent for both: take one codec for the two, such as 'K8V8', 'K4V4' or 'full'"
            )
        return LatentFormat(fmt.key, Full(dtype), fmt.name, rank)

    def widths(self, head_dim: int) -> tuple[int, int]:
        """Channels of the latent and of the rotary part."""
        return self.rank, head_dim - self.rank

    def encode(self, k: Array, v: Array) -> Block:
        """Keys `[..., head_dim, T]` to an encoded block; there is no V."""
        del v
        return super().encode(k[..., : self.rank, :], k[..., self.rank :, :])

    def decode(self, block: Block) -> tuple[Array, Array]:
        """The float32 keys `[..., head_dim, T]` that attention reads, and the latents in them."""
        latent, rotary = super().decode(block)
        return jnp.concatenate([latent, rotary], axis=-2), latent

    def key_logits(self, q: Array, block: Block) -> Array:
        """`q [..., G, head_dim]` times the keys of a block, `[..., G, T]`."""
        rotary = self.value.key_logits(q[..., self.rank :], block.v_payload, block.v_meta)
        return super().key_logits(q[..., : self.rank], block) + rotary

    def value_mix(self, p: Array, block: Block, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the latents of a block, `[..., G, rank]`; tokens not `valid
        [..., T]` are never read.
        """
        return self.key.value_mix(p, block.k_payload, block.k_meta, valid)

    def values(self, k: Array, v: Array) -> Array:
        """The latents `[..., rank]` in exact keys `[..., head_dim]`."""
        del v
        return k[..., : self.rank]
