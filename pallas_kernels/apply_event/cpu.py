"""The compression event on the CPU: the native kernel of cpu.cc, one call, in place."""

import jax
from jax import Array

from ..native import build
from ..pages import PageLayout, Pages
from ..plan_event.reference import Moves, Rule
from .reference import Stored, Tokens
from .ring import FreeRing


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
) -> Stored:
    """`apply_event` of api.py. The kernel counts again what leaves: its pages must be right
    whatever `moves` says, which only makes the call wait for `count_moves`, so that XLA need not
    copy what that reads.

    Raises:
        ValueError or jax.errors.JaxRuntimeError: when run, for a length, page id or ring that leads
            out of an array, or when pages do not suffice; nothing has changed then.
    """
    del max_len
    shapes = {tokens.k.shape[:2], tokens.v.shape[:2]}
    shapes |= {tokens.significance.shape, tokens.position.shape}
    if len(shapes) > 1 or tokens.k.dtype != tokens.v.dtype or entering.shape[1] > tokens.k.shape[1]:
        types = f"{tokens.k.dtype} and {tokens.v.dtype}"
        raise ValueError(
            f"tokens of shapes {shapes}, {types}, must be alike and at least {entering.shape[1]}"
        )
    pages, ring = stored.pages, stored.ring
    arrays = pages.payload, pages.meta, pages.significance, pages.position
    changed = *arrays, stored.page_table, stored.tier_len, ring.ids, ring.start, ring.count
    run = build.call(
        "apply_event",
        "apply_event_cpu",
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed),
        aliases={i: i for i in range(len(changed))},
    )
    formats = layout.native_formats()
    *arrays, table, lengths, ids, start, count = run(
        *changed,
        moves.dropped,
        *rule,
        *tokens,
        entering,
        admitted,
        formats=formats,
        one_victim=one_victim,
    )
    return Stored(Pages(*arrays), FreeRing(ids, start, count), table, lengths)
