"""Tokens picked by a hash of position and head: the baseline that every table needs."""

from typing import Unpack

import jax.numpy as jnp
from jax import Array

from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import KeyScore, LeavingTokens


class RandomScore(KeyScore):
    """A number from 0 to 1, the same for a position and a head in every run."""

    def enter(self, tokens: LeavingTokens) -> Array:
        head = (tokens.head.astype(jnp.uint32) << 20)[:, None]
        return hashed(tokens.position.astype(jnp.uint32) + head)


def hashed(x: Array) -> Array:
    """Well mixed uint32 as float32 in [0, 1)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return ((x ^ (x >> 16)) >> 8).astype(jnp.float32) / (1 << 24)


def random_eviction(keep: Amount = 0.5, **options: Unpack[Options]) -> CompressionPolicy:
    """`keep` of the tokens, by chance."""
    return evicting("random_eviction", RandomScore(), Budget(keep=keep), **options)
