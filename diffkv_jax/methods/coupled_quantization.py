"""Coupled Quantization (arXiv:2405.03917): neighbouring channels share a code."""

from diffkv_jax.arguments import integer
from diffkv_jax.methods.format_names import named_format
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.schedule import Schedule
from diffkv_jax.policy.transform import WithoutRope


def coupled_quantization(
    channels: int = 4, bits: int = 8, *, window: int = 64, flush: int = 32
) -> CompressionPolicy:
    """`channels` neighbouring channels share a code of `bits` bits; keys without RoPE.

    Its codebooks are learned: `generate(..., calibration=calibrate(model, params, tokens,
    policy))`.
    """
    bits, channels = integer("bits", bits, least=0), integer("channels", channels, least=0)
    fmt = named_format(f"K{bits}v{channels}V{bits}v{channels}", bits=bits, channels=channels)
    return CompressionPolicy(
        f"cq_{channels}c{bits}b",
        tiers=(fmt,),
        schedule=Schedule(window=window, flush=flush),
        transform=WithoutRope(),
    )
