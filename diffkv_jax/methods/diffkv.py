"""DiffKV (arXiv 2412.03131): significant tokens at K8V4, less significant ones at K4V2, the rest
dropped, per head and request.
"""

from typing import Literal, Unpack

from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.policy.keep import Alpha, Thresholds
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import Score


class MeanAttention(Score):
    """The mean attention that the queries which saw a token have given it (sec. 4)."""

    per_query = True

    def check(self) -> None:
        if not self.queries:
            raise ValueError("queries=0: MeanAttention needs queries=64, another number, or 'all'")


def diffkv(
    alpha_high: Alpha = 1.0,
    alpha_low: Alpha = 0.0,
    *,
    queries: int | Literal["all"] = 64,
    **options: Unpack[Options],
) -> CompressionPolicy:
    """DiffKV: a token whose mean attention is at least `alpha_high` times uniform attention goes to
    the first tier, one below `alpha_low` times is dropped, the others go to the second.

    Args:
        alpha_high: a number, or nested lists that broadcast to [layers, requests, kv_heads].
        alpha_low: likewise.
        queries: how many of the prompt's last queries score it.
        options: see `diffkv_jax.methods.evicting.Options`; K8V4 and K4V2, no sinks when not given.
    """
    given: Options = {"tiers": ("K8V4", "K4V2"), "sinks": 0, **options}
    keep = Thresholds(alpha_high=alpha_high, alpha_low=alpha_low)
    return evicting("diffkv", MeanAttention(queries=queries), keep, **given)
