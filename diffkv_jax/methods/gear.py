"""GEAR (arXiv:2403.05527): a backbone quantiser, its error in a few ranks, and outliers apart."""

from typing import Literal

from diffkv_jax.arguments import integer, number, one_of
from diffkv_jax.methods.format_names import named_format, outliers_apart, tokens_of_group
from diffkv_jax.methods.kivi import value_channels
from diffkv_jax.policy.fields import MOST_TOKENS
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.schedule import Schedule


def gear(
    bits: int = 2,
    *,
    rank: int = 2,
    outliers: float = 0.02,
    group: int = 64,
    value_group: int | None = None,
    buffer: int = 64,
    backbone: Literal["kivi", "kcvt"] = "kivi",
) -> CompressionPolicy:
    """GEAR: the backbone's error in `rank` ranks a block of `group` tokens, and a share of
    `outliers`; without them (0) it is GEAR-L.

    Backbone "kivi": as in `kivi`, with its `value_group`; "kcvt": keys per channel over the block,
    values per token. New tokens are exact until `buffer` of them have gathered; `group` of those
    are encoded together.
    """
    backbone = one_of("backbone", backbone, ("kivi", "kcvt"))
    bits, rank = integer("bits", bits, least=0), integer("rank", rank, least=0)
    outliers, group = number("outliers", outliers, least=0), tokens_of_group("group", group)
    buffer = integer("buffer", buffer, least=1, most=MOST_TOKENS)
    if buffer < group:
        raise ValueError(
            f"buffer={buffer} must be at least group={group}: the tokens of a group are encoded "
            "together"
        )
    if backbone == "kcvt" and value_group is not None:
        raise ValueError(
            f"value_group={value_group!r} belongs to backbone='kivi': values of 'kcvt' have one "
            "group a token, leave it out"
        )
    fmt = f"K{bits}cV{bits}"
    fmt += f"g{value_channels(group, value_group)}" if backbone == "kivi" else ""
    fmt += outliers_apart(outliers) + (f"+r{rank}" if rank else "")
    given = {"bits": bits, "rank": rank, "outliers": outliers}
    fmt = named_format(fmt, **given, group=group, value_group=value_group)
    schedule = Schedule(window=max(buffer - group, 1), flush=group, group=group)
    return CompressionPolicy(f"gear-{bits}", tiers=(fmt,), schedule=schedule)
