"""The compression event whose traffic `benchmarks roofline` counts."""

from dataclasses import dataclass, replace
from functools import partial
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
    """The parts of a compression event: who leaves, the event itself, the window."""
    event, layout, d = Event.of(s.mix), s.layout, s.model.head_dim
    pages, rule, fills = _judged_pool(s, event)
    (table, lengths), n, max_len = s.tables(), s.heads, s.context + CHUNK
    moves = Moves(
        _of_heads(n, event.dropped), _of_heads(n, event.demoted), _of_heads(n, [-1] * layout.tiers)
    )
    sides = layout.token_data_bytes * n * sum(s.lengths)
    ids = 4.0 * n * sum(s.pages_of_head())
    judge, carry_out = (
        partial(f, one_victim=False, max_len=max_len, kernels=s.kernels)
        for f in (count_moves, apply_event)
    )

    def count(pages, page_table, tier_len, rule):
        return judge(pages, layout, page_table, tier_len, rule)

    free = pages.payload.shape[0] - n * sum(s.pages_of_head())
    ids_of_ring: Any = np.roll(np.arange(len(pages.payload), dtype=np.int32), free)
    start: Any = np.array(0, np.int32)
    count_free: Any = np.array(free, np.int32)
    ring = FreeRing(ids_of_ring, start, count_free)
    k = unknown(n, FLUSH, d)
    side = _of_heads(n, [128.0] * FLUSH, np.float32), _of_heads(n, [0] * FLUSH)
    codes = np.tile(
        np.repeat(np.arange(1, layout.tiers + 1, dtype=np.int32), event.entering), (n, 1)
    )

    def apply(stored, rule, moves, tokens, entering, admitted):
        return carry_out(stored, layout, rule, moves, tokens, entering, admitted, pages_a_round=1)

    column = [s.bytes_of(tier) + layout.token_data_bytes for tier in range(layout.tiers)]
    leaving_tier = [
        event.dropped[tier] + (event.demoted if tier == 0 else 0) for tier in range(layout.tiers)
    ]
    # to the last hole
    scanned = sum(
        length * (1 - 1 / (gone - 1))
        for length, gone in zip(s.lengths, leaving_tier, strict=True)
        if gone
    )
    moved = sum(e * c for e, c in zip(event.entering, column, strict=True)) + event.demoted * sum(
        column
    )
    moved += 2 * fills * max(column) if fills else 0
    must = {
        "sides": float(layout.token_data_bytes * n * scanned),
        "columns": float(n * moved),
        "tables": ids + 100.0 * n,
    }
    must |= {"tokens": n * FLUSH * (4.0 * d + 8), "entering": 4.0 * n * FLUSH}
    once = 1 / FLUSH
    cases = [
        Case(
            "event: count",
            count,
            (pages, table, lengths, rule),
            (),
            {"sides": float(sides), "tables": ids + 40.0 * n},
            once,
        ),
        Case(
            "event: apply",
            apply,
            (
                Stored(pages, ring, table, lengths),
                rule,
                moves,
                Tokens(k, k, *side),
                codes,
                np.ones(n, bool),
            ),
            (0,),
            must,
            once,
        ),
    ]
    window = s.held()
    scores = unknown(s.model.layers, n, SLOTS if layout.scored else 0, dtype=jnp.float32)

    def shift(recent_k, recent_v, significance, layer, shift):
        return shift_recent(recent_k, recent_v, significance, layer, shift, kernels=s.kernels)

    slot_bytes = n * (4.0 * d + (4 if layout.scored else 0))
    must = {"windows": slot_bytes * (SLOTS - FLUSH + SLOTS), "shift": 4.0 * n}
    operands = (window.recent_k, window.recent_v, scores, window.layer, np.full(n, FLUSH, np.int32))
    cases.append(Case("event: shift", shift, operands, (0, 1, 2), must, once))
    return cases if layout.scored else cases[1:]
