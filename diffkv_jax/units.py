"""Amounts of memory as users write them."""

import re

from diffkv_jax.arguments import integer, number, refuse

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
# at most, on either side of the point: more than any memory has, less than float overflows at
_DIGITS = 30
_AMOUNT = re.compile(
    rf"\s*(\d{{1,{_DIGITS}}}\.?\d{{0,{_DIGITS}}}|\.\d{{1,{_DIGITS}}})\s*([A-Za-z]*)\s*"
)


def parse_bytes(budget: int | str, field: str = "memory_budget") -> int:
    """Bytes from a number or text such as "512MiB" or "1.5 GB"; `field` is what a message calls it.

    Raises:
        TypeError: neither a number nor text.
        ValueError: not a positive amount, or an unknown unit.
    """
    try:
        amount = _from_text(budget) if isinstance(budget, str) else _from_number(field, budget)
    except ValueError as error:
        rule = "a number of bytes or text such as '512MiB' or '2GB'"
        refuse(field, budget, rule, isinstance(error, TypeError))
    if amount <= 0:
        refuse(field, budget, "more than zero bytes")
    return amount


def _from_text(budget: str) -> int:
    match = _AMOUNT.fullmatch(budget)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _from_number(field: str, budget: int) -> int:
    amount = number(field, budget, least=0)
    try:
        return integer(field, budget, most=None)
    except ValueError:  # of a float whole bytes count
        return int(amount)
