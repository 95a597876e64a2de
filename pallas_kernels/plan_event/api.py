"""Which stored tokens leave their tier: the public function."""

from collections.abc import Callable
from typing import Any

from jax import Array

from ..dispatch import XLA, Kernels, Operation
from ..pages import PageLayout, Pages
from ..precision import in_32_bits
from ..support import writes
from . import reference
from .reference import Moves, Rule


def _kernels(implementation: str) -> Callable[..., Any]:
    if implementation == "triton":
        from .triton import count_moves as run
    elif implementation == "mosaic_tpu":
        from .mosaic_tpu import count_moves as run
    else:
        from .cpu import count_moves as run
    return run


def _supports(implementation: str, layout: PageLayout) -> str | None:
    return writes(implementation, layout) if layout.scored else "tokens have no scores: none leaves"


COUNT_MOVES = Operation(reference.count_moves, _kernels, supports=_supports)


@in_32_bits
def count_moves(
    pages: Pages,
    layout: PageLayout,
    page_table: Array,
    tier_len: Array,
    rule: Rule,
    *,
    one_victim: bool,
    max_len: int,
    kernels: Kernels = XLA,
) -> Moves:
    """Classify the stored tokens of `B` heads by mean significance and count those that leave.

    DiffKV, arXiv 2412.03131 sec. 4 and Algorithm 1. A token below the low threshold is dropped from
    any tier; one of tier 0 below the high threshold alone is demoted to tier 1 where there is one;
    comparisons are strict. `apply_event` decides the same way.

    Args:
        pages: the pool; significance and position are read through `page_table [B, max_pages]`,
            nothing changes.
        layout: static geometry of the pages; when it is not scored nothing leaves.
        page_table, tier_len: int32 `[B, max_pages]`, `[B, tiers]`; what lies beyond the lengths is
            never used.
        rule: thresholds and clocks.
        one_victim: at most one token leaves each tier: the least significant one (the oldest of
            equals), if it must leave and a token enters its tier (`rule.receives`).
        max_len: bounds the tokens of a head.
        kernels: which implementation runs.
    """
    count = COUNT_MOVES.on(kernels, layout)
    return count(pages, layout, page_table, tier_len, rule, one_victim=one_victim, max_len=max_len)
