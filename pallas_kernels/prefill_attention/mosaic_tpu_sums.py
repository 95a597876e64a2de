"""Column sums of a prompt chunk's observing rows as one Pallas kernel for TPU."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..decode_attention.reference import Heads
from ..dispatch import tpu_interpreter
from ..pages import PageLayout, Pages
from .mosaic_tpu import pages_of_step, queries
from .mosaic_tpu_pages import (
    BUFFERS,
    Buffers,
    Group,
    Tier,
    capped,
    check_table,
    column_of,
    dots_of,
    largest_divisor,
    matmul,
    of_head,
    over_steps,
    pool_inputs,
    window_of_head,
)
from .reference import Chunk, Scale
from .sums_reference import ColumnSums

QUERY_BYTES = 4 << 20  # of VMEM for a head's observing rows; the next head's are on their way too


@dataclass(frozen=True)
class Blocks:
    """Sizes of one step."""

    observed: int  # rows at the chunk's end in VMEM: all observing ones, divides the chunk
    rows: int  # of these at a time, with all query heads of the group; divides `observed`
    keys: int  # of one step; whole pages

    @staticmethod
    def choose(layout: PageLayout, group: int, chunk_len: int, observe: int) -> "Blocks":
        """About 512 pairs of row and query head, and four blocks of tokens."""
        observed = next(
            n
            for n in range(observe, chunk_len + 1)
            if chunk_len % n == 0 and (n % 16 == 0 or n == chunk_len)
        )
        rows = largest_divisor(observed, max(16, 512 // group))
        return Blocks(observed, rows, 4 * layout.tokens)


class Inputs(NamedTuple):
    """The Refs that the kernel reads (Arrays outside of it), scalar memory first."""

    page_table: Any  # SMEM int32 [B, max_pages]
    tier_len: Any  # SMEM int32 [B, tiers]
    recent_len: Any  # SMEM int32 [B]
    layer: Any  # SMEM int32 [1]
    length: Any  # SMEM int32 [B]
    q: Any  # VMEM [G, observed, d], the last rows of this head
    lse: Any  # VMEM float32 [G, C] of this head
    k: Any  # VMEM [C, d] of this head
    recent_k: Any  # VMEM [slots, d] of this layer and head
    payload: Any  # HBM uint8 [num_pages, rows, T]
    meta: Any  # HBM int16 [num_pages, meta_rows, T]
    old: Any  # HBM float32 [num_pages, blocks, T], the significance: the same memory as the output


class Scratch(NamedTuple):
    """VMEM beside the pages."""

    shift: Any  # float32 [G, observed, 1]: log-sum-exp, +inf in rows that do not count
    scores: Any  # float32 [BUFFERS, pages of a step, blocks, T]: significance being changed
    read: Any  # DMA semaphores [BUFFERS]
    written: Any  # DMA semaphores [BUFFERS]

    @staticmethod
    def of(significance: Array, group: int, observed: int, pages: int) -> "Scratch":
        """Scratch for `observed` rows and at most `pages` pages a step."""
        return Scratch(
            pltpu.VMEM((group, observed, 1), jnp.float32),
            pltpu.VMEM((BUFFERS, pages, *significance.shape[1:]), jnp.float32),
            pltpu.SemaphoreType.DMA((BUFFERS,)),
            pltpu.SemaphoreType.DMA((BUFFERS,)),
        )


def column_sums(
    chunk: Chunk,
    lse: Array,
    observe: int,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    scale: Scale,
    *,
    interpret: bool | Literal["checked"] = False,
    blocks: Blocks | None = None,
) -> ColumnSums:
    """`column_sums` of api.py on TPU. The pool stays in HBM; the significance is changed in place.

    Raises:
        ValueError: the observing rows or the page table are more than the chip's near memory is
            given for.
    """
    b, g, c, d = chunk.q.shape
    blocks = blocks or Blocks.choose(layout, g, c, observe)
    check_table(heads.page_table)
    _check_queries(g * blocks.observed * max(d, 128) * chunk.q.dtype.itemsize, g, observe)
    slots, step_pages = heads.recent_k.shape[2], max(pages_of_step(layout, blocks.keys))
    last, hbm = c // blocks.observed - 1, pl.BlockSpec(memory_space=pltpu.HBM)
    rows = pl.BlockSpec((None, g, blocks.observed, d), lambda head, *_: (head, 0, last, 0))
    recent = window_of_head(slots, d)
    inputs = Inputs(
        *(heads.page_table, heads.tier_len, heads.recent_len, heads.layer.reshape(1), chunk.length),
        *(chunk.q, lse, chunk.k, heads.recent_k),
        *pool_inputs(pages, interpret),
        pages.significance,
    )
    scratch = Scratch.of(pages.significance, g, blocks.observed, step_pages)
    # else XLA carries a small pool to VMEM and back
    in_place = jax.ShapeDtypeStruct if interpret else pltpu.HBM
    significance, of_recent, of_chunk = pl.pallas_call(
        partial(_kernel, layout=layout, scale=scale, blocks=blocks, observe=observe),
        out_shape=[
            in_place(pages.significance.shape, jnp.float32),
            *(jax.ShapeDtypeStruct((b, 1, n), jnp.float32) for n in (slots, c)),
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(b,),
            in_specs=[rows, of_head(g, c), of_head(c, d), recent, hbm, hbm, hbm],
            out_specs=[hbm, of_head(1, slots), of_head(1, c)],
            scratch_shapes=[*scratch, *Buffers.of(layout, step_pages)],
        ),
        input_output_aliases={len(inputs) - 1: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=tpu_interpreter(interpret),
        name="column_sums",
    )(*inputs)
    return ColumnSums(significance, of_recent[:, 0], of_chunk[:, 0])


def _check_queries(query_bytes: int, group: int, observe: int) -> None:
    if query_bytes > QUERY_BYTES:
        raise ValueError(
            f"{observe=} rows of {group} query heads take {query_bytes} bytes of VMEM, and at most "
            f"{QUERY_BYTES} are given; let fewer rows observe, take a smaller prefill_chunk or use "
            "implementation='xla'"
        )


def _kernel(*refs, layout: PageLayout, scale: Scale, blocks: Blocks, observe: int):
    """Program (head): every key of a head, scored by the chunk's last `observe` real rows.

    Reads K payload and metadata of the head's live pages once and its q, log-sum-exp, chunk K and
    recent K; adds to the significance of live tokens (pages of float32 [blocks, T], read and
    written back by copies) and writes sums float32 [1, slots] and [1, C].
    """
    inputs, (significance, recent, own) = Inputs(*refs[:12]), refs[12:15]
    scratch, buffers = Scratch(*refs[15:19]), Buffers(*refs[19:])
    head, dtype, c = pl.program_id(0), inputs.q.dtype, inputs.k.shape[0]
    length = inputs.length[head]
    count = jnp.minimum(length, observe)
    _load_shift(scratch.shift, inputs.lse, count)
    sums = partial(_sums, inputs, scratch.shift, layout, blocks, scale, c - count)

    for number, pages in enumerate(pages_of_step(layout, blocks.keys)):
        stored = jnp.where(count > 0, inputs.tier_len[head, number], 0)
        pool = (inputs.page_table, inputs.payload, inputs.meta)
        tier = Tier(layout, number, head, stored, pages, *pool, buffers)
        k_rows, _ = layout.value_start(number)
        _score_tier(tier, k_rows, scratch, significance, sums, scale, dtype)

    slots = inputs.recent_k.shape[0]
    for first in range(0, slots, blocks.keys):
        size = min(blocks.keys, slots - first)
        live = first + lax.broadcasted_iota(jnp.int32, (size, 1), 0) < inputs.recent_len[head]
        k = jnp.where(live, inputs.recent_k[first : first + size, :], 0).astype(dtype)
        seen = first + lax.broadcasted_iota(jnp.int32, (1, size), 1) < inputs.recent_len[head]
        recent[:, first : first + size] = sums(
            size, partial(_exact_dots, k, scale), lambda row, seen=seen: seen
        )

    width = largest_divisor(c, max(128, blocks.keys))
    for first in range(0, c, width):
        key = first + lax.broadcasted_iota(jnp.int32, (1, width), 1)
        k = inputs.k[first : first + width, :]
        own[:, first : first + width] = sums(
            width,
            partial(_exact_dots, k, scale),
            lambda row, key=key: (key <= row) & (key >= c - length),
            first_seen_by=first,
        )


def _load_shift(shift, lse, count) -> None:
    """The log-sum-exp `[G, C]` of the last rows as columns, +inf in all but the last `count` rows,
    so that their weights are 0.
    """
    (g, observed, _), c = shift.shape, lse.shape[1]
    for member in range(g):
        for first in range(0, observed, 128):
            size = min(128, observed - first)
            start = c - observed + first
            column = column_of(lse[member : member + 1, start : start + size])
            row = first + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
            counted = jnp.where(row >= observed - count, column, jnp.inf)
            shift[member, first : first + size, :] = counted


def _exact_dots(k: Array, scale: Scale, q_of: Callable[[Group], tuple[Array, Array]]) -> Array:
    q, _ = q_of(Group(0, k.shape[1], ()))
    return matmul(q, k, (1, 1)) * scale.sm_scale


def _sums(
    inputs: Inputs,
    shift,
    layout: PageLayout,
    blocks: Blocks,
    scale: Scale,
    first_counted,
    n: int,
    dots: Callable[[Callable], Array],
    seen: Callable[[Array], Array],
    first_seen_by=0,
) -> Array:
    """`exp(logit - lse)` summed over the observing rows of a query head, then maximum or mean over
    the group: `[1, n]`.

    `dots(q_of)` gives scaled dot products `[G * rows, n]`; `seen(row)` which keys `[.., n]` rows
    `[G * rows, 1]` of the chunk see; no row before `first_counted` counts, none before
    `first_seen_by` sees any of the keys.
    """
    (g, observed, _), c, rows = inputs.q.shape, inputs.k.shape[0], blocks.rows
    before = c - observed

    def add(i, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        first = pl.multiple_of(i * rows, rows)
        logits = capped(dots(queries(inputs.q.at[:, pl.ds(first, rows), :], layout)), scale)
        row = before + first + lax.rem(lax.broadcasted_iota(jnp.int32, (g * rows, 1), 0), rows)
        logits = jnp.where(seen(row), logits, -jnp.inf)
        weights = jnp.exp(logits - shift[:, pl.ds(first, rows), :].reshape(g * rows, 1))
        parts = (weights[m * rows : (m + 1) * rows].sum(axis=0, keepdims=True) for m in range(g))
        return tuple(total + part for total, part in zip(totals, parts, strict=True))

    start = lax.div(jnp.maximum(jnp.maximum(first_counted, first_seen_by) - before, 0), rows)
    totals = lax.fori_loop(start, observed // rows, add, (jnp.zeros((1, n), jnp.float32),) * g)
    return reduce(jnp.maximum, totals) if layout.group == "max" else reduce(jnp.add, totals) / g


def _score_tier(
    tier: Tier,
    k_rows: int,
    scratch: Scratch,
    significance,
    sums: Callable[..., Array],
    scale: Scale,
    dtype,
) -> None:
    """Add the column sums of the stored tokens of a tier to their significance, page by page."""
    layout, blocks = tier.layout, tier.layout.blocks[tier.number]
    total = layout.pages_for(tier.number, tier.length)

    def each_live(step, slot, act: Callable) -> None:
        """`act(page in the pool, its place in VMEM, slot)` for each live page of a step, if any."""
        for page in range(tier.pages):

            @pl.when((step >= 0) & (step * tier.pages + page < total))
            def _(page=page):
                pool = significance.at[tier.page_id(step * tier.pages + page)]
                act(pool, scratch.scores.at[slot, page], slot)

    def read(pool, here, slot):
        return pltpu.make_async_copy(pool, here, scratch.read.at[slot])

    def written(pool, here, slot):
        return pltpu.make_async_copy(here, pool, scratch.written.at[slot])

    def add(step, slot) -> None:
        each_live(step - BUFFERS, slot, lambda *at: written(*at).wait())
        each_live(step, slot, lambda *at: read(*at).start())
        valid = tier.valid(step)
        keys = tier.keys(slot, valid, dtype)
        dots = partial(dots_of, keys=keys, factor=scale.sm_scale)
        scores = sums(tier.step_tokens, dots, lambda row: valid)
        each_live(step, slot, lambda *at: read(*at).wait())
        for number in range(tier.pages * blocks):
            first = number * layout.tokens
            lane = first + lax.broadcasted_iota(jnp.int32, (1, layout.tokens), 1)
            at = (slot, number // blocks, pl.ds(number % blocks, 1))
            old, new = scratch.scores[at], scores[:, first : first + layout.tokens]
            live = step * tier.step_tokens + lane < tier.length
            scratch.scores[at] = jnp.where(live, old + new, old)
        each_live(step, slot, lambda *at: written(*at).start())

    over_steps(tier, k_rows, add)
    steps = pl.cdiv(tier.length, tier.step_tokens)
    for back in range(BUFFERS, 0, -1):
        step = steps - back
        each_live(step, lax.rem(step + BUFFERS, BUFFERS), lambda *at: written(*at).wait())
