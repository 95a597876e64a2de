"""TurboQuant (arXiv:2504.19874) without QJL."""

import dataclasses

from diffkv_jax.arguments import integer
from diffkv_jax.methods.format_names import named_format
from diffkv_jax.methods.quantized import quantized
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.transform import Hadamard


def turboquant(bits: int = 4, *, window: int = 64, flush: int = 32) -> CompressionPolicy:
    """Rotated, then the best scalar levels for a normal variable, one scale a token."""
    bits = integer("bits", bits, least=0)
    fmt = named_format(f"K{bits}nV{bits}n", bits=bits)
    policy = quantized(fmt, window=window, flush=flush, transform=Hadamard())
    return dataclasses.replace(policy, name="turboquant")
