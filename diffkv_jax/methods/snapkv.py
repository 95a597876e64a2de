"""SnapKV (arXiv:2404.14469): keep what the prompt's last queries attend to, averaged over
neighbouring positions.
"""

from typing import Any, Unpack

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.policy.fields import tokens
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import Score, ScoreView
from diffkv_jax.policy.stage import static


class LastQueries(Score):
    """The base of scores that are the attention of the prompt's last queries alone; the policy
    decides once a prompt.
    """

    in_decode = False
    resets = True

    def check(self) -> None:
        if self.queries in (0, "all"):
            raise ValueError(
                f"queries={self.queries!r} must be a number such as 64: {type(self).__name__} is "
                "that of the prompt's last queries"
            )


class WindowAttention(LastQueries):
    """Averaged over neighbouring positions.

    Attributes:
        kernel_size: width of the moving average, in which tokens of the recent window, protected
            and dropped ones count as 0, as does what lies beyond the ends.
    """

    kernel_size: int = static(default=5, convert=tokens, length=True)

    @property
    def rescores(self) -> bool:
        return self.kernel_size > 1

    def rescore(self, state: Any, view: ScoreView) -> Array:
        counted = view.leaving & ~view.protected
        rows = view.by_position(jnp.where(counted, view.scores, 0.0), counted, view.max_len)
        return view.from_position(moving_average(rows, self.kernel_size))


def moving_average(x: Array, width: int) -> Array:
    """Mean over `width` neighbours of the last axis `[B, n]`, zeros beyond its ends."""
    before = (width - 1) // 2
    padding = ((0, 0), (before, width - 1 - before))
    return lax.reduce_window(x, 0.0, lax.add, (1, width), (1, 1), padding) / width


def snapkv(
    keep: Amount = 0.5, *, kernel_size: int = 5, **options: Unpack[Options]
) -> CompressionPolicy:
    """SnapKV: the prompt's last `window` queries score."""
    queries = tokens("window", options.get("window", 64))
    score = WindowAttention(queries=queries, reduce="mean", kernel_size=kernel_size)
    return evicting("snapkv", score, Budget(keep=keep), **options)
