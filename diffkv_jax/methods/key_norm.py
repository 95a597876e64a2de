"""L2-norm eviction (arXiv:2406.11430): the keys with the smallest norms stay."""

from typing import Unpack

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.pallas_kernels.codecs.scales import length
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import KeyScore, LeavingTokens


class KeyNorm(KeyScore):
    """The smaller a key's norm, the better. The channels of a latent have been normalised, so that
    the others alone make it up.
    """

    def enter(self, tokens: LeavingTokens) -> Array:
        k = tokens.k[..., tokens.attention.latent :].astype(jnp.float32)
        return -break_ties(length(k)[..., 0], tokens.position)


def break_ties(norm: Array, position: Array) -> Array:
    """Norms rounded to 15 bits, and below them the position, the later token with the smaller
    number.

    In the first layer keys of equal tokens have equal norms but for rounding, which differs from
    batch to batch.
    """
    bits = lax.bitcast_convert_type(norm, jnp.uint32)
    later = ~position.astype(jnp.uint32) & jnp.uint32(0xFF)
    bits = ((bits + jnp.uint32(0x80)) & jnp.uint32(0xFFFFFF00)) | later
    return lax.bitcast_convert_type(bits, jnp.float32)


def key_norm(
    keep: Amount = 0.5, *, whole_layers: tuple[int, ...] = (0, 1), **options: Unpack[Options]
) -> CompressionPolicy:
    """L2-norm eviction: beside the first and the recent tokens; layers 0 and 1 keep everything.

    Models that normalise their keys (Qwen3, Gemma 3) leave little to rank by.
    """
    budget = Budget(keep=keep, whole_layers=whole_layers)
    return evicting("key_norm", KeyNorm(), budget, **options)
