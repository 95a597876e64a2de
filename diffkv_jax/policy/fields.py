"""What each field of a `CompressionPolicy` may be, and as what it is kept: plain, hashable values
that JSON knows.
"""

import dataclasses
from functools import partial
from typing import Any, get_args

from diffkv_jax.arguments import (
    flag,
    integer,
    nested,
    number,
    one_of,
    refuse,
    text,
    token_ids,
    tuple_of,
)
from diffkv_jax.policy.pairs import Merge
from diffkv_jax.policy.replay import Replay
from diffkv_jax.policy.selection import Score
from diffkv_jax.units import parse_bytes

AXES = 3  # of what broadcasts to [layers, requests, kv_heads]
# of a window or another stretch of the context: positions that float32 holds exactly
MOST_TOKENS = 2**24
MOST_ALPHA = 2**31 - 1  # attention is at most 1, uniform attention at least one over so many tokens


def _observed(name: str, value: Any) -> Any:
    if value is None or (isinstance(value, str) and value == "all"):
        return value and "all"
    try:
        return integer(name, value, least=1, most=MOST_TOKENS)
    except ValueError as error:
        refuse(
            name,
            value,
            "a number of queries of at least 1, 'all' or None",
            isinstance(error, TypeError),
        )


def _budget(name: str, value: Any) -> Any:
    """None, an amount of memory (`keep` alone), or shares or numbers of tokens: either all float or
    all int.
    """
    if value is None:
        return None
    if isinstance(value, str) and name == "keep":
        parse_bytes(value, name)
        return str.__str__(value)
    try:
        found = nested(name, value, _count_or_share, axes=AXES)
        kinds = _kinds(found)
        return (
            nested(name, found, partial(number, above=0, most=1), axes=AXES)
            if float in kinds
            else found
        )
    except ValueError as error:
        rule = (
            "a share above 0 and up to 1 (float), a number of tokens (int) or, for keep, memory "
            "such as '64MiB'"
        )
        refuse(
            name,
            value,
            f"{rule}; nested lists of one kind broadcast to [layers, requests, kv_heads]",
            isinstance(error, TypeError),
        )


def _count_or_share(name: str, value: Any) -> int | float:
    share = number(name, value, above=0)
    try:
        return integer(name, value)
    except ValueError:
        return share


def _kinds(value: Any) -> set[type]:
    return set().union(*map(_kinds, value)) if isinstance(value, tuple) else {type(value)}


def _part(kind: type, name: str, value: Any) -> Any:
    """A part of a policy that is data itself, or one from the mapping that JSON makes of it; None:
    it has none.
    """
    names = sorted(field.name for field in dataclasses.fields(kind))
    if isinstance(value, dict) and all(key in names for key in value):
        return kind(**value)
    if value is not None and not isinstance(value, kind):
        refuse(name, value, f"a {kind.__name__}, or a mapping with any of {names}", True)
    return value


_alpha = partial(
    number, least=0, most=MOST_ALPHA, rule=f"finite and not negative, and at most {MOST_ALPHA}"
)
_recover = partial(
    number,
    above=0,
    most=1,
    rule="the share of its attention that a head must hold: above 0 and up to 1",
)
_tokens = partial(integer, least=1, most=MOST_TOKENS)
_share = partial(number, least=0, most=1)
_from_zero = partial(integer, least=0)
_spread = "'uniform', 'pyramid' or 'cosine', or 'pooled' with score='replay'"

FIELDS = {  # in the order of the dataclass: of several bad ones the first is named
    "name": partial(text, rule="the text that reports show"),
    "tiers": partial(tuple_of, each=text, rule="a list of format names such as ['K8V4', 'K4V2']"),
    "alpha_high": partial(nested, each=_alpha, axes=AXES),
    "alpha_low": partial(nested, each=_alpha, axes=AXES),
    "window": _tokens,
    "observe": _observed,
    "flush": _tokens,
    "score": partial(one_of, choices=get_args(Score), optional=True),
    "group": partial(one_of, choices=("max", "mean")),
    "keep": _budget,
    "keep_high": _budget,
    "layers": partial(one_of, choices=("uniform", "pyramid", "cosine", "pooled"), rule=_spread),
    "whole_layers": partial(
        tuple_of,
        each=_from_zero,
        rule="a list of layers such as [0, 1]",
        entry_rule="numbers of layers: integers of at least 0",
    ),
    "pooled": partial(
        _share,
        optional=True,
        rule="the share of its budget that each head keeps: from 0 to 1, or None",
    ),
    "sinks": partial(integer, least=0, most=MOST_TOKENS),
    "pooling": _tokens,
    "rotate": flag,
    "un_rope": flag,
    "future": _tokens,
    "epsilon": _share,
    "newest_weight": partial(
        number, above=0, most=10**6, rule="a finite number above 0 and up to 1000000"
    ),
    "shared": flag,
    "nested": flag,
    "protect": token_ids,
    "recover": lambda name, value: (
        None if value is None else nested(name, value, _recover, axes=AXES)
    ),
    "punctuation": token_ids,
    "frequent": _share,
    "local": _share,
    "block": partial(integer, least=32, most=256, multiple=32, optional=True),
    "replay": partial(_part, Replay),
    "merge": partial(_part, Merge),
}


def convert_fields(policy: Any) -> None:
    """Put what `FIELDS` make of the given values into a `CompressionPolicy` that is being made.

    Raises:
        TypeError, ValueError: a value that its field cannot have, named.
    """
    for name, convert in FIELDS.items():
        object.__setattr__(policy, name, convert(name, getattr(policy, name)))
