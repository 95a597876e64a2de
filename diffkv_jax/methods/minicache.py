"""MiniCache (arXiv:2405.14366): pairs of deep layers keep one direction for a token of both.

What a pair stores is a stage of its own (`diffkv_jax.policy.pairs`) with three call sites beside
the compression event, because it is about two layers at once: `steps.prefill`,
`steps.decode_event` and `cache.pool_size`.
"""

from diffkv_jax.methods.format_names import named_format
from diffkv_jax.policy.pairs import LayerPairs
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.schedule import Schedule
from diffkv_jax.policy.transform import EXACT, Transform


def minicache(
    start: float = 0.5,
    t: float = 0.6,
    retention: float = 0.05,
    *,
    inner: str = "full",
    window: int = 64,
    flush: int = 32,
    transform: Transform = EXACT,
) -> CompressionPolicy:
    """From the share `start` of the layers on, pairs of them are merged.

    `inner` stores directions, the tokens of the layers before, and the share `retention` of tokens
    that differ too much to be merged.
    """
    return CompressionPolicy(
        "minicache",
        tiers=(named_format(inner, inner=inner),),
        schedule=Schedule(window=window, flush=flush),
        transform=transform,
        pairs=LayerPairs(start=start, t=t, retention=retention),
    )
