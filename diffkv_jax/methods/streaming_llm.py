"""StreamingLLM (arXiv:2309.17453): the first tokens and the most recent ones."""

from typing import Unpack

import jax.numpy as jnp
from jax import Array

from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import KeyScore, LeavingTokens


class Recency(KeyScore):
    """The later, the better."""

    def enter(self, tokens: LeavingTokens) -> Array:
        return tokens.position.astype(jnp.float32)


def streaming_llm(keep: Amount = 0.5, **options: Unpack[Options]) -> CompressionPolicy:
    """StreamingLLM. Keys keep their positions: they are not rotated anew."""
    return evicting("streaming_llm", Recency(), Budget(keep=keep), **options)
