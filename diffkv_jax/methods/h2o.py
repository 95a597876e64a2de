"""H2O (arXiv:2306.14048): the tokens with the largest sum of attention over all queries so far."""

from typing import Unpack

from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import Score


class AttentionSum(Score):
    """The attention that scoring queries have given a token, added up."""

    def check(self) -> None:
        if not self.queries:
            raise ValueError("queries=0: AttentionSum needs queries=64, another number, or 'all'")


def h2o(keep: Amount = 0.5, **options: Unpack[Options]) -> CompressionPolicy:
    """H2O: `keep` of the tokens, by their attention from all queries; the mean over a group's query
    heads.
    """
    score = AttentionSum(queries="all", reduce="mean")
    return evicting("h2o", score, Budget(keep=keep), **options)
