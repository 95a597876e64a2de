"""Every token at one format."""

from diffkv_jax.methods.format_names import named_format
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.schedule import Schedule
from diffkv_jax.policy.transform import USUAL, Transform


def quantized(
    fmt: str, *, window: int = 64, flush: int = 32, transform: Transform = USUAL
) -> CompressionPolicy:
    """Every token outside the recent window at one format, such as "K8V4"; nothing is dropped."""
    fmt = named_format(fmt, fmt=fmt)
    schedule = Schedule(window=window, flush=flush)
    return CompressionPolicy(fmt, tiers=(fmt,), schedule=schedule, transform=transform)
