"""Names of formats that methods make of their arguments: refused ones name those."""

from functools import partial
from typing import Any

from diffkv_jax.arguments import WrongType, integer, shown
from diffkv_jax.pallas_kernels.codecs import KVFormat

# How many tokens are encoded together (`Schedule.group`).
tokens_of_group = partial(integer, least=32, most=256, multiple=32)


def named_format(name: str, **given: Any) -> str:
    """The format `name`, which is one of the arguments `given` or made of them.

    Raises:
        TypeError: it is no text.
        ValueError: there is no such format; names the arguments.
    """
    arguments = ", ".join(f"{argument}={shown(value)}" for argument, value in given.items())
    if not isinstance(name, str):
        raise WrongType(f"{arguments} must be the name of a format such as 'K8V4'")
    try:
        KVFormat.parse(name)
    except ValueError as error:
        raise ValueError(f"{arguments}: {error}") from None
    return str.__str__(name)


def outliers_apart(outliers: float) -> str:
    """What says in a format's name that a share of outliers is kept apart, in percent."""
    return "+o" + f"{100 * outliers:.12f}".rstrip("0").rstrip(".") if outliers else ""
