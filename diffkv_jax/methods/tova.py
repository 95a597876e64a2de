"""TOVA (arXiv:2401.06104): the tokens that the last query attends to most."""

from typing import Unpack

from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import Score


class LastQuery(Score):
    """The attention that the last query gives."""

    resets = True

    def check(self) -> None:
        if self.queries != 1:
            raise ValueError(f"queries={self.queries!r} must be 1: LastQuery is that of one query")


def tova(keep: Amount = 0.5, **options: Unpack[Options]) -> CompressionPolicy:
    """TOVA: `keep` of the tokens; for each KV head, where the paper averages over all heads.

    Between two events nothing leaves; `flush=1` decides at every step, as the paper does.
    """
    score = LastQuery(queries=1, reduce="mean")
    return evicting("tova", score, Budget(keep=keep), **options)
