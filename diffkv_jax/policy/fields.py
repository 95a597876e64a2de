"""Converters that several stages share: a value as given to a plain, hashable one JSON knows."""

from functools import partial
from typing import Any

from diffkv_jax.arguments import integer, nested, number, refuse
from diffkv_jax.units import parse_bytes

AXES = 3  # of what broadcasts to [layers, requests, kv_heads]
# Of a window or another stretch of the context: positions that float32 holds exactly.
MOST_TOKENS = 2**24
MOST_ALPHA = 2**31 - 1  # attention is at most 1, uniform attention at least one over so many tokens


def alpha(name: str, value: Any) -> Any:
    """A threshold in units of uniform attention, or nested tuples of them."""
    rule = f"finite and not negative, and at most {MOST_ALPHA}"
    return nested(name, value, partial(number, least=0, most=MOST_ALPHA, rule=rule), axes=AXES)


def budget(name: str, value: Any, *, in_bytes: bool = False) -> Any:
    """None, an amount of memory (with `in_bytes`), or shares or numbers of tokens, of one kind."""
    if value is None:
        return None
    if isinstance(value, str) and in_bytes:
        parse_bytes(value, name)
        return str.__str__(value)
    try:
        found = nested(name, value, _count_or_share, axes=AXES)
        kinds = _kinds(found)
        share = partial(number, above=0, most=1)
        return nested(name, found, share, axes=AXES) if float in kinds else found
    except ValueError as error:
        rule = (
            "a share above 0 and up to 1 (float), a number of tokens (int) or, for keep, memory "
            "such as '64MiB'; nested lists of one kind broadcast to [layers, requests, kv_heads]"
        )
        refuse(name, value, rule, isinstance(error, TypeError))


def _count_or_share(name: str, value: Any) -> int | float:
    share = number(name, value, above=0)
    try:
        return integer(name, value)
    except ValueError:
        return share


def _kinds(value: Any) -> set[type]:
    return set().union(*map(_kinds, value)) if isinstance(value, tuple) else {type(value)}


tokens = partial(integer, least=1, most=MOST_TOKENS)  # a stretch of the context
from_zero = partial(integer, least=0)
share = partial(number, least=0, most=1)
