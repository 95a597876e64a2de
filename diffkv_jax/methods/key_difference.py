"""KeyDiff (arXiv:2504.15364): the keys least like the mean of all unit keys of their prompt chunk;
after the prompt, of the window.
"""

from typing import Unpack

import jax.numpy as jnp
from jax import Array

from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.pallas_kernels.codecs.scales import length
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import KeyScore, LeavingTokens


class KeyDifference(KeyScore):
    """The less a key is like the mean key, the better."""

    def enter(self, tokens: LeavingTokens) -> Array:
        return -cosine_to_mean_key(tokens.k.astype(jnp.float32), tokens.valid)


def cosine_to_mean_key(k: Array, valid: Array) -> Array:
    """Cosine of each key `[B, n, d]` with the mean of the valid unit keys: `[B, n]`."""
    unit = k / jnp.maximum(length(k), 1e-30)
    # the length of the mean does not matter
    anchor = jnp.where(valid[..., None], unit, 0.0).sum(axis=1)
    norm = jnp.maximum(jnp.linalg.norm(anchor, axis=-1), 1e-12)
    return (unit * anchor[:, None]).sum(axis=-1) / norm[:, None]


def key_difference(keep: Amount = 0.5, **options: Unpack[Options]) -> CompressionPolicy:
    """KeyDiff: `keep` of the tokens."""
    return evicting("key_difference", KeyDifference(), Budget(keep=keep), **options)
