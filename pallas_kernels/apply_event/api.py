"""The compression event of many heads at once: the public function."""

from collections.abc import Callable
from typing import Any

from jax import Array

from ..dispatch import XLA, Kernels, Operation
from ..pages import PageLayout
from ..plan_event.reference import Moves, Rule
from ..precision import in_32_bits
from ..support import writes
from . import event
from .reference import Stored, Tokens


def _kernels(implementation: str) -> Callable[..., Any]:
    if implementation == "triton":
        from .triton import apply_event as run
    elif implementation == "mosaic_tpu":
        from .mosaic_tpu import apply_event as run
    else:
        from .cpu import apply_event as run
    return run


APPLY_EVENT = Operation(event.apply_event, _kernels, supports=writes)


@in_32_bits
def apply_event(
    stored: Stored,
    layout: PageLayout,
    rule: Rule,
    moves: Moves,
    tokens: Tokens,
    entering: Array,
    admitted: Array,
    *,
    one_victim: bool,
    max_len: int,
    pages_a_round: int,
    kernels: Kernels = XLA,
) -> Stored:
    """Carry out a compression event in place: drop and demote tokens, let new ones in, move pages.

    DiffKV, arXiv 2412.03131 sec. 5.2 and 5.3 (parallel KV compaction), Algorithm 1. For each
    admitted head: tokens of tier 1, then of tier 0, that leave (see `count_moves`) are removed; the
    last tokens of the tier fill their holes: the n-th survivor from the top goes to the n-th hole
    from the bottom; demoted ones are requantised to the tail of tier 1 in the order in which the
    top slots were cleared (for a top slot that is a victim itself, that victim; else the victim
    whose hole it fills). Then the entering tokens are encoded at the tails, in order. Emptied pages
    are free again. A head never holds more pages than before or after, whichever is more.

    Args:
        stored: pool, ring and tables of `B` heads; the caller has made sure that the ring holds the
            pages that admitted heads need beyond their own.
        layout: static geometry of the pages.
        rule: who leaves.
        moves: what `count_moves` gave for the same `stored` and `rule`.
        tokens: exact tokens `[B, >= n, ...]`, the first n of which enter.
        entering: int32 `[B, n]` tier code of each, `DROPPED` where it enters no tier.
        admitted: bool `[B]`; the other heads stay as they are.
        one_victim, max_len: as given to `count_moves`.
        pages_a_round: pages of victims that the reference handles at a time; the kernels ignore it.
        kernels: which implementation runs.
    """
    plain = APPLY_EVENT.chosen(kernels, layout) == XLA
    return APPLY_EVENT.on(kernels, layout)(
        stored,
        layout,
        rule,
        moves,
        tokens,
        entering,
        admitted,
        one_victim=one_victim,
        max_len=max_len,
        **dict(pages_a_round=pages_a_round) if plain else {},
    )
