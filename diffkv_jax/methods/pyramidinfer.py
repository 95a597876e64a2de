"""PyramidInfer (arXiv:2405.12532): one set of tokens a layer, fewer with depth, chosen while the
prompt is read; what a layer drops is not there for deeper ones.
"""

from functools import partial
from typing import Any, Unpack

import jax.numpy as jnp
from jax import Array

from diffkv_jax.arguments import flag, number
from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.methods.snapkv import LastQueries
from diffkv_jax.policy.fields import tokens
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import ScoreView
from diffkv_jax.policy.stage import static

_weight = partial(number, above=0, most=10**6, rule="a finite number above 0 and up to 1000000")


class PivotalContext(LastQueries):
    """The attention of the prompt's last queries, the last one counting most, averaged over the
    heads of a layer: all keep the same tokens.

    Attributes:
        newest_weight: what the last of the scoring queries counts; the first counts 1, linearly
            between.
        nested: whether deeper layers attend without the prompt tokens that a layer drops.
    """

    newest_weight: float = static(default=1.2, convert=_weight)
    nested: bool = static(default=True, convert=flag)
    shares_tokens = True

    @property
    def hides_dropped(self) -> bool:
        return self.nested

    def query_weights(self, index: Array, count: Array) -> Array:
        return 1 + (self.newest_weight - 1) * index / jnp.maximum(count - 1, 1)

    def rescore(self, state: Any, view: ScoreView) -> Array:
        kv_heads = view.attention.num_kv_heads
        by_request = view.scores.reshape(-1, kv_heads, view.scores.shape[1])
        return jnp.repeat(by_request.mean(axis=1), kv_heads, axis=0)


def pyramidinfer(
    keep: Amount = 0.5,
    *,
    newest_weight: float = 1.2,
    nested: bool = True,
    **options: Unpack[Options],
) -> CompressionPolicy:
    """PyramidInfer: `keep` is the mean over the layers; the last `window` queries score."""
    queries = tokens("window", options.get("window", 64))
    score = PivotalContext(
        queries=queries, reduce="mean", newest_weight=newest_weight, nested=nested
    )
    return evicting("pyramidinfer", score, Budget(keep=keep, layers="cosine"), **options)
