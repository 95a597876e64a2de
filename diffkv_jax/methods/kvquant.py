"""KVQuant (arXiv:2401.18079): learned levels, of each channel's range for keys and of each token's
for values.
"""

import dataclasses

from diffkv_jax.arguments import integer, number
from diffkv_jax.methods.format_names import named_format, outliers_apart
from diffkv_jax.methods.streaming_llm import Recency
from diffkv_jax.policy.keep import Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.protect import Protect
from diffkv_jax.policy.schedule import Schedule
from diffkv_jax.policy.transform import WithoutRope


def kvquant(
    bits: int = 4, outliers: float = 0.01, *, sinks: int = 0, window: int = 64, flush: int = 32
) -> CompressionPolicy:
    """KVQuant; keys without RoPE.

    The share `outliers` of each token (0: none) is kept apart. With `sinks` the first tokens stay
    exact, in a tier of their own through which prompts of several chunks pass: give a memory
    budget. Its tables are learned, as those of `coupled_quantization`.
    """
    bits, outliers = integer("bits", bits, least=0), number("outliers", outliers, least=0)
    apart = outliers_apart(outliers)
    fmt = named_format(f"K{bits}sV{bits}t{apart}", bits=bits, outliers=outliers)
    schedule, protect = Schedule(window=window, flush=flush), Protect(sinks=sinks)
    policy = CompressionPolicy(
        f"kvquant_{bits}b{apart}", tiers=(fmt,), schedule=schedule, transform=WithoutRope()
    )
    if not protect.sinks:
        return policy
    return dataclasses.replace(
        policy,
        tiers=("full", fmt),
        score=Recency(),
        protect=protect,
        keep=Budget(keep=2**30, keep_high=schedule.window + protect.sinks),
    )
