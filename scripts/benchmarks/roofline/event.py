"""The compression event whose traffic `benchmarks roofline` counts."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.roofline.cases import CHUNK, FLUSH, OBSERVE, SLOTS, Case, Mix, Setting, unknown
from diffkv_jax.pallas_kernels.apply_event.api import apply_event
from diffkv_jax.pallas_kernels.apply_event.reference import Stored, Tokens
from diffkv_jax.pallas_kernels.apply_event.ring import FreeRing
from diffkv_jax.pallas_kernels.pages import Pages
from diffkv_jax.pallas_kernels.plan_event.api import count_moves
from diffkv_jax.pallas_kernels.plan_event.reference import Moves, Rule
from diffkv_jax.pallas_kernels.recent_window.api import shift_recent


@dataclass(frozen=True)
class Event:
    """What a compression event does to each head: tokens that enter a tier, and stored ones that
    are demoted or dropped.
    """

    entering: tuple[int, ...]
    demoted: int
    dropped: tuple[int, ...]

    @staticmethod
    def of(mix: Mix) -> "Event":
        """32 tokens enter as the mix has them; where there is a low tier 8 are demoted and 4 low
        ones dropped; else nothing leaves.
        """
        low = round(FLUSH * mix.shares[1] / sum(mix.shares)) if len(mix.shares) > 1 else 0
        entering = (FLUSH - low, low)[: len(mix.shares)]
        return Event(entering, 8 if low else 0, (0, 4 if low else 0)[: len(mix.shares)])


def _of_heads(heads: int, values, dtype: Any = np.int32) -> Any:
    """The same known numbers for every head."""
    return np.tile(np.array(values, dtype), (heads, *(1,) * np.ndim(values)))


def _judged_pool(s: Setting, event: Event) -> tuple[Pages, Rule, int]:
    """The pool of one layer in which evenly spread tokens of each head leave, the rule that says
    so, and the tokens that fill holes.
    """
    layout, (table, _) = s.layout, s.tables()
    pages = jax.eval_shape(lambda: Pages.zeros(layout, s.heads * sum(s.pages_of_head()) * 4 // 3))
    significance = np.full(pages.significance.shape, 128.0, np.float32)  # 64 queries: a mean of 2
    position, fills = np.zeros(pages.position.shape, pages.position.dtype), 0
    for tier, length in enumerate(s.lengths):
        # means of 0.75 and 0
        falls, gone = (event.demoted, 48.0) if tier == 0 else (event.dropped[tier], 0.0)
        slot = np.linspace(0, length - 1, falls).astype(int) if falls else np.zeros(0, int)
        fills += falls - int((slot >= length - falls).sum())
        index, within = np.divmod(slot, layout.tokens_per_page(tier))
        page = table[:, index if tier == 0 else s.max_pages - 1 - index]
        significance[page, within // layout.tokens, within % layout.tokens] = gone
    n = s.heads
    rule = Rule(
        tau=_of_heads(n, [1.0, 0.5], np.float32),
        query_spans=_of_heads(n, [[s.context, OBSERVE]]),
        has_new_tokens=_of_heads(n, True, bool),
        receives=_of_heads(n, [True] * layout.tiers, bool),
    )
    return replace(pages, significance=significance, position=position), rule, fills


def event_cases(s: Setting) -> list[Case]:
    """The parts of a compression event: who leaves (where the policy scores), the event itself, the
    window.
    """
    event = Event.of(s.mix)
    pages, rule, fills = _judged_pool(s, event)
    counts = [_count_case(s, pages, rule)] if s.layout.scored else []
    return [*counts, _apply_case(s, event, pages, rule, fills), _shift_case(s)]


def _options(s: Setting) -> dict[str, Any]:
    return {"one_victim": False, "max_len": s.context + CHUNK, "kernels": s.kernels}


def _count_case(s: Setting, pages: Pages, rule: Rule) -> Case:
    """How many leave each tier."""
    layout, options = s.layout, _options(s)

    def count(pages, page_table, tier_len, rule):
        return count_moves(pages, layout, page_table, tier_len, rule, **options)

    sides = float(layout.token_data_bytes * s.heads * sum(s.lengths))
    must = {"sides": sides, "tables": _page_id_bytes(s) + 40.0 * s.heads}
    return Case("event: count", count, (pages, *s.tables(), rule), (), must, 1 / FLUSH)


def _apply_case(s: Setting, event: Event, pages: Pages, rule: Rule, fills: int) -> Case:
    """The event itself, on a pool where `fills` stored tokens move into holes."""
    layout, n = s.layout, s.heads
    options: dict[str, Any] = _options(s) | {"pages_a_round": 1}

    def apply(stored, rule, moves, tokens, entering, admitted):
        return apply_event(stored, layout, rule, moves, tokens, entering, admitted, **options)

    stored = Stored(pages, _free_ring(s, len(pages.payload)), *s.tables())
    moves = Moves(
        _of_heads(n, event.dropped), _of_heads(n, event.demoted), _of_heads(n, [-1] * layout.tiers)
    )
    k = unknown(n, FLUSH, s.model.head_dim)
    side = _of_heads(n, [128.0] * FLUSH, np.float32), _of_heads(n, [0] * FLUSH)
    entering = _of_heads(n, np.repeat(np.arange(1, layout.tiers + 1), event.entering))
    arguments = (stored, rule, moves, Tokens(k, k, *side), entering, np.ones(n, bool))
    must = _apply_bytes(s, event, fills)
    return Case("event: apply", apply, arguments, (0,), must, 1 / FLUSH)


def _free_ring(s: Setting, num_pages: int) -> FreeRing:
    """The pages of the pool that no head holds, which are its last."""
    free = num_pages - s.heads * sum(s.pages_of_head())
    ids: Any = np.roll(np.arange(num_pages, dtype=np.int32), free)
    start: Any = np.array(0, np.int32)
    count: Any = np.array(free, np.int32)
    return FreeRing(ids, start, count)


def _apply_bytes(s: Setting, event: Event, fills: int) -> dict[str, float]:
    """What an event must move: significance and positions of stored tokens up to the last hole, the
    columns of those that enter, are demoted or fill holes, and its arguments.
    """
    layout, n = s.layout, s.heads
    leaving = (event.dropped[0] + event.demoted, *event.dropped[1:])
    scanned = sum(
        length * (1 - 1 / (gone - 1))
        for length, gone in zip(s.lengths, leaving, strict=True)
        if gone
    )
    column = [s.bytes_of(tier) + layout.token_data_bytes for tier in range(layout.tiers)]
    moved = sum(e * c for e, c in zip(event.entering, column, strict=True))
    moved += event.demoted * sum(column) + 2 * fills * max(column)
    return {
        "sides": float(layout.token_data_bytes * n * scanned),
        "columns": float(n * moved),
        "tables": _page_id_bytes(s) + 100.0 * n,
        "tokens": n * FLUSH * (4.0 * s.model.head_dim + 8),
        "entering": 4.0 * n * FLUSH,
    }


def _page_id_bytes(s: Setting) -> float:
    """Of the live columns of the page tables."""
    return 4.0 * s.heads * sum(s.pages_of_head())


def _shift_case(s: Setting) -> Case:
    """The rest of the window to its beginning."""
    n, window, scored = s.heads, s.held(), s.layout.scored
    scores = unknown(s.model.layers, n, SLOTS if scored else 0, dtype=jnp.float32)

    def shift(recent_k, recent_v, significance, layer, shift):
        return shift_recent(recent_k, recent_v, significance, layer, shift, kernels=s.kernels)

    slot_bytes = n * (4.0 * s.model.head_dim + (4 if scored else 0))
    must = {"windows": slot_bytes * (SLOTS - FLUSH + SLOTS), "shift": 4.0 * n}
    operands = (window.recent_k, window.recent_v, scores, window.layer, np.full(n, FLUSH, np.int32))
    return Case("event: shift", shift, operands, (0, 1, 2), must, 1 / FLUSH)
