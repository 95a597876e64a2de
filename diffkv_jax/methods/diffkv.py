"""DiffKV (arXiv 2412.03131): significant tokens at K8V4, less significant ones at K4V2, the rest
dropped, per head and request.
"""

from typing import Literal, Unpack

from diffkv_jax.arguments import flag
from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.policy.keep import Alpha, Thresholds
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import Score
from diffkv_jax.policy.stage import static


class MeanAttention(Score):
    """The mean attention that queries have given a token: about the last `queries` of those that
    saw it.

    Attributes:
        forgets: False: all that saw it, as in the paper (sec. 4), and so with `queries="all"`.
    """

    forgets: bool = static(default=True, convert=flag)
    per_query = True

    @property
    def horizon(self) -> int | None:
        return self.queries if self.forgets and self.queries != "all" else None

    def check(self) -> None:
        if not self.queries:
            raise ValueError("queries=0: MeanAttention needs queries=64, another number, or 'all'")


def diffkv(
    alpha_high: Alpha = 1.0,
    alpha_low: Alpha = 0.0,
    *,
    queries: int | Literal["all"] = 64,
    forgets: bool = True,
    **options: Unpack[Options],
) -> CompressionPolicy:
    """DiffKV: a token whose mean attention is at least `alpha_high` times uniform attention goes to
    the first tier, one below `alpha_low` times is dropped, the others go to the second.

    Args:
        alpha_high: a number, or nested lists that broadcast to [layers, requests, kv_heads].
        alpha_low: likewise.
        queries: how many of a prompt's last queries score it, and over about how many of the last
            ones its mean goes in decode.
        forgets: False: the mean goes over all queries that saw it, as in the paper; so it does with
            `queries="all"`.
        options: see `diffkv_jax.methods.evicting.Options`; K8V4 and K4V2, no sinks when not given.
    """
    given: Options = {"tiers": ("K8V4", "K4V2"), "sinks": 0, **options}
    keep = Thresholds(alpha_high=alpha_high, alpha_low=alpha_low)
    return evicting("diffkv", MeanAttention(queries=queries, forgets=forgets), keep, **given)
