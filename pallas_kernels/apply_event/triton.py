"""The compression event on GPUs (Triton): one launch, one program a head, in place."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..decode_attention.triton_keys import check_pool
from ..pages import PageLayout, Pages
from ..plan_event.reference import Moves, Rule
from ..plan_event.triton import Judge
from .plan import leaving_of, of_admitted, sizes_after
from .reference import Stored, Tokens
from .ring import FreeRing
from .triton_columns import Columns, Pool, check_tiles, encoded, write
from .triton_head import Blocks, Head, Inputs, State, pages_of
from .triton_removal import remove


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
    interpret: bool | Literal["checked"],
    blocks: Blocks | None = None,
) -> Stored:
    """`apply_event` of api.py on GPUs, one launch and a few operations on arrays of `B`."""
    del max_len  # lengths are read
    check_tiles(layout)
    check_pool(stored.pages)
    blocks, heads = blocks or Blocks.choose(layout), entering.shape[0]
    inputs, ring = _plan(stored, layout, rule, moves, tokens, entering, admitted)
    pages = stored.pages
    pool = [pages.payload, pages.meta, pages.significance, pages.position]
    used = [array.size > 0 for array in pool]
    changed = [array for array in pool if array.size]
    changed += [stored.page_table, stored.tier_len, stored.ring.ids]
    results = pl.pallas_call(
        partial(
            _kernel,
            layout=layout,
            used=used,
            one_victim=one_victim,
            blocks=blocks,
            barrier=_nothing if interpret else plgpu.debug_barrier,
        ),
        grid=(heads,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed]
        + [jax.ShapeDtypeStruct((heads, blocks.width), jnp.int32)],
        input_output_aliases={len(inputs) + i: i for i in range(len(changed))},
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=bool(interpret),
        name="apply_event",
    )(*inputs, *changed)
    new = iter(results)
    pairs = zip(pool, used, strict=True)
    pages = Pages(*(next(new) if in_use else array for array, in_use in pairs))
    page_table, tier_len, ids = next(new), next(new), next(new)
    return Stored(pages, FreeRing(ids, ring.start, ring.count), page_table, tier_len)


def _plan(
    stored: Stored,
    layout: PageLayout,
    rule: Rule,
    moves: Moves,
    tokens: Tokens,
    entering: Array,
    admitted: Array,
) -> tuple[Inputs, FreeRing]:
    """What each head loses, gains and moves to or from the ring; the ring after, without its ids.

    A prefix sum gives each head its own range of the ring (DiffKV, arXiv 2412.03131 sec. 5.2).
    Pages taken lie in `[start, start + count)`, pages given up go to `[start + count, ...)`; those
    are the places of pages that heads hold, so that the two never meet, wherever the ring wraps
    around: programs may read and write them in any order.
    """
    gated = of_admitted(entering, moves, admitted)
    sizes = sizes_after(layout, stored.tier_len, *gated)
    granted, given = jnp.maximum(sizes.more, 0), jnp.maximum(-sizes.more, 0)
    ring, size = stored.ring, stored.ring.ids.shape[0]
    take = ring.start + jnp.cumsum(granted) - granted
    give = lax.rem(ring.start + ring.count, size) + jnp.cumsum(given) - given
    inputs = Inputs(
        rule.tau,
        rule.query_spans,
        admitted.astype(jnp.int32),
        leaving_of(gated[1]),
        moves.victim,
        jnp.stack(sizes.arriving, axis=-1),
        granted,
        take,
        give,
        entering,
        *tokens,
    )
    taken = granted.sum()
    return inputs, FreeRing(ring.ids, (ring.start + taken) % size, ring.count - taken + given.sum())


def _kernel(
    *refs, layout: PageLayout, used: list[bool], one_victim: bool, blocks: Blocks, barrier: Any
) -> None:
    """Program `head`: tier 1, then tier 0 lose tokens, then the entering ones are encoded.

    DiffKV, arXiv 2412.03131 sec. 5.2, 5.3 and Algorithm 1. Reads significance and position (6 or 8
    bytes) of tokens up to the last hole; for every token that leaves, reads and writes about one
    column (payload, metadata, significance, position) of its tier, and one of tier 1 if it is
    demoted; for every entering token, reads K and V and writes one column. Nothing for heads not
    admitted.

    After `Inputs` come the aliased arrays, which the outputs `State` hold too.
    """
    inputs, outputs = Inputs(*refs[: len(Inputs._fields)]), iter(refs[-(sum(used) + 4) :])
    pool = Pool(*(next(outputs) if in_use else None for in_use in used))
    state = State(pool, *outputs)
    index = pl.program_id(0)

    @pl.when(inputs.admitted[index] != 0)
    def _():
        lengths = tuple(state.tier_len[index, tier] for tier in range(layout.tiers))
        held = sum(pages_of(layout, lengths)) + inputs.granted[index]
        head = Head(inputs, state, layout, blocks, one_victim, barrier, index, held)
        head.take_granted(lengths)
        if layout.scored:
            judge = Judge.of(inputs.tau, inputs.query_spans, index, layout.tiers)
            for tier in reversed(range(layout.tiers)):
                lengths = remove(head, judge, tier, lengths)
        for tier in range(layout.tiers):
            lengths = _append(head, tier, lengths)
        head.give_back(lengths)
        for tier, length in enumerate(lengths):
            state.tier_len[index, tier] = length


def _append(head: Head, tier: int, lengths: tuple) -> tuple:
    """Encode the tokens that enter a tier at its tail, in order; the tiers' lengths after."""
    inputs, n = head.inputs, head.inputs.entering.shape[1]
    grown = tuple(
        length + inputs.arriving[head.index, tier] if t == tier else length
        for t, length in enumerate(lengths)
    )
    if tier == 1:
        head.resize_low(lengths, grown)

    def body(step, length):
        nth = step * head.blocks.enter + jnp.arange(head.blocks.enter, dtype=jnp.int32)
        at = inputs.entering.at[head.index, jnp.where(nth < n, nth, n)]
        code = plgpu.load(at, mask=nth < n, other=0)
        enters = code == tier + 1
        rank, count = jnp.cumsum(enters.astype(jnp.int32)) - 1, enters.astype(jnp.int32).sum()

        @pl.when(count > 0)
        def _():
            slots = head.locate(tier, length + rank, enters)
            write(head.state.pool, head.layout, tier, slots, _encoded(head, tier, nth, enters))

        return length + count

    lax.fori_loop(0, pl.cdiv(n, head.blocks.enter), body, lengths[tier])
    head.barrier()
    return grown


def _encoded(head: Head, tier: int, nth: Array, valid: Array) -> Columns:
    """Entering tokens number `nth [n]` as columns of a tier."""
    inputs, fmt, head_dim = head.inputs, head.layout.formats[tier], head.layout.head_dim
    pairs = zip(fmt.scalars(), (inputs.k, inputs.v), strict=True)
    k, v = (encoded(codec, head_dim, x, head.index, nth, valid) for codec, x in pairs)
    at, token_data = (head.index, jnp.where(valid, nth, 0)), (inputs.significance, inputs.position)
    significance, position = (plgpu.load(x.at[at], mask=valid, other=0) for x in token_data)
    return Columns(k, v, significance, position)


def _nothing() -> None:
    """The barrier of the interpreter, which runs one program after the other, in order."""
