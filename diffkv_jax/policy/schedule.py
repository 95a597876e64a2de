"""`Schedule`: how many recent tokens stay exact, and when the others leave."""

from functools import partial

from diffkv_jax.arguments import integer
from diffkv_jax.policy.fields import tokens
from diffkv_jax.policy.stage import Stage, static


class Schedule(Stage):
    """When tokens leave the recent window.

    Attributes:
        window: number of most recent tokens that stay exact.
        flush: decode steps between two compression events; 1 is Algorithm 1 of the DiffKV paper.
        group: tokens of a page, which leave together where a codec shares numbers over the tokens
            of one ("K2cV2"): a multiple of 32 up to 256; None: 32 there.
    """

    window: int = static(default=64, convert=tokens, length=True)
    flush: int = static(default=32, convert=tokens, length=True)
    group: int | None = static(
        default=None, convert=partial(integer, least=32, most=256, multiple=32, optional=True)
    )
