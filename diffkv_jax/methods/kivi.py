"""KIVI (arXiv:2402.02750): keys per channel in groups of tokens, values per token in groups of
channels.
"""

from typing import Any

from diffkv_jax.arguments import integer
from diffkv_jax.methods.format_names import named_format, tokens_of_group
from diffkv_jax.policy.fields import MOST_TOKENS
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.schedule import Schedule
from diffkv_jax.policy.transform import EXACT, Transform


def kivi(
    bits: int = 2,
    *,
    group: int = 32,
    value_group: int | None = None,
    residual: int = 128,
    transform: Transform = EXACT,
) -> CompressionPolicy:
    """KIVI: keys per channel in groups of `group` tokens, values per token in groups of
    `value_group` channels.

    `value_group` must divide the model's head_dim; None: `group`, or the nearest divisor of
    head_dim (20 for 80 and 32).
    At most `residual` recent tokens are exact; they leave `group` at a time.
    """
    group = tokens_of_group("group", group)
    residual = integer("residual", residual, least=1, most=MOST_TOKENS)
    bits, window = integer("bits", bits, least=0), residual - group
    if window < 1:
        raise ValueError(
            f"residual={residual} must be larger than group={group}: the tokens of a group leave "
            "together, one at least stays"
        )
    name = f"K{bits}cV{bits}g{value_channels(group, value_group)}"
    fmt = named_format(name, bits=bits, group=group, value_group=value_group)
    schedule = Schedule(window=window, flush=group, group=group)
    return CompressionPolicy(f"kivi-{bits}", tiers=(fmt,), schedule=schedule, transform=transform)


def value_channels(group: int, value_group: Any) -> int:
    """Channels of a group of values; None: as many as a group of keys has tokens."""
    if value_group is None:
        return group
    return integer("value_group", value_group, least=1, most=MOST_TOKENS)
