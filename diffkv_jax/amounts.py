"""Amounts of memory as users write them."""

import re

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(budget: int | str, field: str = "memory_budget") -> int:
    """Bytes from an integer or text such as "512MiB" or "1.5 GB"; `field` is what a message calls it.

    Raises:
        ValueError: not a positive amount, or an unknown unit.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", str(budget))
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{field}={budget!r} must be a number of bytes or text such as '512MiB' or '2GB'")
    amount = int(float(match[1]) * unit)
    if amount <= 0:
        raise ValueError(f"{field}={budget!r} must be more than zero bytes")
    return amount
