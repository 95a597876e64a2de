"""Which stored tokens leave their tier, on the CPU: the native kernel of cpu.cc."""

import jax
import jax.numpy as jnp
from jax import Array

from ..native import build
from ..pages import PageLayout, Pages
from .reference import Moves, Rule


def count_moves(
    pages: Pages,
    layout: PageLayout,
    page_table: Array,
    tier_len: Array,
    rule: Rule,
    *,
    one_victim: bool,
    max_len: int,
) -> Moves:
    """`count_moves` of api.py, for a scored layout.

    Raises:
        ValueError or jax.errors.JaxRuntimeError: when run, for a length or page id that leads out
            of an array.
    """
    del max_len  # lengths are read
    per_tier = jax.ShapeDtypeStruct(tier_len.shape, jnp.int32)
    demoted = jax.ShapeDtypeStruct(tier_len.shape[:1], jnp.int32)
    run = build.call("plan_event", "count_moves_cpu", per_tier, demoted, per_tier)
    operands = pages.significance, pages.position, page_table, tier_len, *rule
    return Moves(*run(*operands, formats=layout.native_formats(), one_victim=one_victim))
