"""Attention of a prompt chunk as one TPU kernel: pages, window and chunk in one online softmax."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..decode_attention.reference import Heads
from ..dispatch import tpu_interpreter
from ..pages import PageLayout, Pages
from .mosaic_tpu_pages import (
    Buffers,
    Group,
    Tier,
    capped,
    check_table,
    dots_of,
    groups_of,
    largest_divisor,
    matmul,
    of_head,
    over_steps,
    pool_inputs,
    row_of,
    window_of_head,
)
from .reference import Chunk, Scale


@dataclass(frozen=True)
class Blocks:
    """Sizes of one program."""

    rows: int  # of the chunk, with all query heads; divides it, a multiple of 128 or all of it
    keys: int  # of one step; whole pages, and a divisor of the chunk

    @staticmethod
    def choose(layout: PageLayout, group: int, rows: int) -> "Blocks":
        """About 512 pairs (row, query head), at most four blocks of tokens, 1 MiB of logits."""
        rows = largest_divisor(rows, max(128, 512 // group))
        keys = max(1, min(4, (1 << 18) // (group * rows * layout.tokens))) * layout.tokens
        return Blocks(rows, keys)


class Inputs(NamedTuple):
    """The Refs that the kernel reads (Arrays outside of it), scalar memory first."""

    page_table: Any  # SMEM int32 [B, max_pages]
    tier_len: Any  # SMEM int32 [B, tiers]
    recent_len: Any  # SMEM int32 [B]
    layer: Any  # SMEM int32 [1]
    length: Any  # SMEM int32 [B]
    q: Any  # VMEM [G, rows, d] of this program
    k: Any  # VMEM [C, d] of this head
    v: Any  # VMEM [C, d] of this head
    recent_k: Any  # VMEM [slots, d] of this layer and head
    recent_v: Any  # VMEM [slots, d] of this layer and head
    payload: Any  # HBM uint8 [num_pages, rows, T]
    meta: Any  # HBM int16 [num_pages, meta_rows, T]


class Scratch(NamedTuple):
    """VMEM of the online softmax of M pairs of row and query head."""

    maximum: Any  # float32 [M, 1]
    total: Any  # float32 [M, 1]
    output: Any  # float32 [M, d], unnormalised


def prefill_attention(
    chunk: Chunk,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    scale: Scale,
    *,
    interpret: bool | Literal["checked"] = False,
    blocks: Blocks | None = None,
) -> tuple[Array, Array]:
    """`prefill_attention` of api.py on TPU. The pool stays in HBM."""
    b, g, c, d = chunk.q.shape
    blocks = blocks or Blocks.choose(layout, g, c)
    check_table(heads.page_table)
    pairs, recent = g * blocks.rows, window_of_head(heads.recent_k.shape[2], d)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    rows = pl.BlockSpec((None, g, blocks.rows, d), lambda head, block, *_: (head, 0, block, 0))
    totals = pl.BlockSpec((None, g, blocks.rows), lambda head, block, *_: (head, 0, block))
    inputs = Inputs(
        *(heads.page_table, heads.tier_len, heads.recent_len, heads.layer.reshape(1), chunk.length),
        *(chunk.q, chunk.k, chunk.v, heads.recent_k, heads.recent_v),
        *pool_inputs(pages, interpret),
    )
    scratch = Scratch(
        pltpu.VMEM((pairs, 1), jnp.float32),
        pltpu.VMEM((pairs, 1), jnp.float32),
        pltpu.VMEM((pairs, d), jnp.float32),
    )
    return pl.pallas_call(
        partial(_kernel, layout=layout, scale=scale, blocks=blocks),
        out_shape=(
            jax.ShapeDtypeStruct((b, g, c, d), jnp.float32),
            jax.ShapeDtypeStruct((b, g, c), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(b, c // blocks.rows),
            in_specs=[rows, of_head(c, d), of_head(c, d), recent, recent, hbm, hbm],
            out_specs=[rows, totals],
            scratch_shapes=[*scratch, *Buffers.of(layout, max(pages_of_step(layout, blocks.keys)))],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=tpu_interpreter(interpret),
        name="prefill_attention",
    )(*inputs)


def pages_of_step(layout: PageLayout, keys: int) -> list[int]:
    """Pages of each tier that hold about `keys` tokens, at least one."""
    return [max(1, keys // layout.tokens_per_page(tier)) for tier in range(layout.tiers)]


def _kernel(*refs, layout: PageLayout, scale: Scale, blocks: Blocks):
    """Program (head, block): `blocks.rows` rows of the chunk, G query heads, every key they see.

    Pair m is row m % rows of query head m // rows, so that a page is read and unpacked once for all
    G heads. Reads the head's live pages (payload and metadata, once a program, by double-buffered
    copies from HBM); q, the head's chunk K and V (once a head) and the layer's recent window arrive
    in VMEM. Writes output float32 [G, rows, d] and log-sum-exp float32 [G, rows].
    """
    inputs, (out, lse) = Inputs(*refs[:12]), refs[12:14]
    state, buffers = Scratch(*refs[14:17]), Buffers(*refs[17:])
    head, first_row = pl.program_id(0), pl.program_id(1) * blocks.rows
    (g, rows, d), c, dtype = inputs.q.shape, inputs.k.shape[0], inputs.q.dtype
    attends = first_row + rows > c - inputs.length[head]  # else all rows are padding
    state.maximum[...] = jnp.full((g * rows, 1), -jnp.inf, jnp.float32)
    state.total[...] = jnp.zeros((g * rows, 1), jnp.float32)
    state.output[...] = jnp.zeros((g * rows, d), jnp.float32)
    q_of = queries(inputs.q, layout)

    for number, pages in enumerate(pages_of_step(layout, blocks.keys)):
        length = jnp.where(attends, inputs.tier_len[head, number], 0)
        pool = (inputs.page_table, inputs.payload, inputs.meta)
        tier = Tier(layout, number, head, length, pages, *pool, buffers)

        def add_stored(step, slot, tier=tier):
            valid = tier.valid(step)
            dots = dots_of(q_of, tier.keys(slot, valid, dtype), scale.sm_scale)
            weights = _weights(state, jnp.where(valid, capped(dots, scale), -jnp.inf))
            for group, codes, factor, zero in tier.values(slot, valid, dtype):
                channels = slice(group.first, group.first + group.size)
                scaled = (weights if factor is None else weights * factor).astype(dtype)
                mixed = matmul(scaled, codes, (1, 1))
                if zero is not None:
                    mixed = mixed + (weights * zero).sum(axis=1, keepdims=True)
                state.output[:, channels] = state.output[:, channels] + mixed

        over_steps(tier, layout.rows, add_stored)

    @pl.when(attends)
    def _():
        q, _ = q_of(Group(0, d, ()))
        _add_recent(state, q, inputs, inputs.recent_len[head], scale, blocks)
        _add_own(state, q, inputs, inputs.length[head], first_row, rows, scale, blocks)

    _finish(state, out, lse)


def _finish(state: Scratch, out, lse) -> None:
    """Write the output float32 `[G, rows, d]` and the log-sum-exp `[G, rows]`."""
    g, rows, d = out.shape
    some = state.total[...] > 0
    total = jnp.where(some, state.total[...], 1.0)
    out[...] = (state.output[...] / total).reshape(g, rows, d)
    column = jnp.where(some, state.maximum[...] + jnp.log(total), jnp.inf)
    for member in range(g):
        for first in range(0, rows, 128):
            size = min(128, rows - first)
            row = row_of(column[member * rows + first :][:size])
            lse[member : member + 1, first : first + size] = row


def queries(ref, layout: PageLayout) -> Callable[[Group], tuple[Array, Array]]:
    """Queries `ref [G, rows, d]` as pairs: `q_of(group)` gives channels `[G * rows, size]` and
    float32 sums over them `[G * rows, 1]`.
    """
    g, rows, d = ref.shape
    groups = {group[:2] for fmt in layout.formats for group in groups_of(fmt.scalars()[0], d)}
    loaded = {}
    for first, size in sorted(groups | {(0, d)}):
        q = ref[:, :, first : first + size].reshape(g * rows, size)
        loaded[first, size] = q, q.astype(jnp.float32).sum(axis=1, keepdims=True)
    return lambda group: loaded[group.first, group.size]


def _weights(state: Scratch, logits: Array) -> Array:
    """Take `logits [M, n]` (masked ones -inf) into maximum and total, rescale the output, and give
    the weights of the values `[M, n]`.
    """
    old = state.maximum[...]
    maximum = jnp.maximum(old, logits.max(axis=1, keepdims=True))
    safe = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    weights, rescale = jnp.exp(logits - safe), jnp.exp(old - safe)
    state.maximum[...] = maximum
    state.total[...] = state.total[...] * rescale + weights.sum(axis=1, keepdims=True)
    state.output[...] = state.output[...] * rescale
    return weights


def _add_recent(
    state: Scratch, q: Array, inputs: Inputs, length, scale: Scale, blocks: Blocks
) -> None:
    """The live slots of the recent window; dead ones may hold NaN."""
    slots = inputs.recent_k.shape[0]
    for first in range(0, slots, blocks.keys):
        size = min(blocks.keys, slots - first)
        live = first + lax.broadcasted_iota(jnp.int32, (size, 1), 0) < length
        k, v = (
            jnp.where(live, ref[first : first + size, :], 0).astype(q.dtype)
            for ref in (inputs.recent_k, inputs.recent_v)
        )
        logits = capped(matmul(q, k, (1, 1)) * scale.sm_scale, scale)
        slot = first + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        weights = _weights(state, jnp.where(slot < length, logits, -jnp.inf))
        state.output[...] = state.output[...] + matmul(weights.astype(q.dtype), v)


def _add_own(
    state: Scratch,
    q: Array,
    inputs: Inputs,
    length,
    first_row,
    rows: int,
    scale: Scale,
    blocks: Blocks,
) -> None:
    """The chunk's own keys, from its first token to the diagonal block; causal."""
    c = inputs.k.shape[0]
    width = largest_divisor(c, blocks.keys)

    def add(i, _):
        k = inputs.k[pl.ds(i * width, width), :]
        logits = capped(matmul(q, k, (1, 1)) * scale.sm_scale, scale)
        row = first_row + lax.rem(lax.broadcasted_iota(jnp.int32, (q.shape[0], 1), 0), rows)
        key = i * width + lax.broadcasted_iota(jnp.int32, (1, width), 1)
        weights = _weights(state, jnp.where((key <= row) & (key >= c - length), logits, -jnp.inf))
        output, weights = state.output[...], weights.astype(q.dtype)
        state.output[...] = output + matmul(weights, inputs.v[pl.ds(i * width, width), :])
        return None

    lax.fori_loop(lax.div(c - length, width), pl.cdiv(first_row + rows, width), add, None)
