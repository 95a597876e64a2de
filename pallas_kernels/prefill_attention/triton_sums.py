"""Column sums of a chunk's observing rows: Triton kernels over pages, recent window and chunk."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..decode_attention.reference import Heads
from ..decode_attention.triton_blocks import stored_blocks
from ..decode_attention.triton_keys import (
    LOG2_E,
    CodeTile,
    chunk_key_index,
    exact_keys,
    gathered,
    key_pieces,
    load_rows,
    logits_of,
)
from ..pages import PageLayout, Pages
from .reference import Chunk, Scale
from .sums_reference import ColumnSums
from .triton import Inputs

READ = len(Inputs._fields)  # Refs before the log-sum-exp


@dataclass(frozen=True)
class Blocks:
    """Sizes of one program."""

    rows: int  # observing rows of one query head at a time, a power of two of at least 16
    keys: int  # of one step, a power of two of at least 16 and of the tokens of a block
    splits: int  # programs that share the pages of a head
    warps: int
    stages: int

    @staticmethod
    def choose(
        layout: PageLayout, heads: int, max_pages: int, observe: int, itemsize: int
    ) -> "Blocks":
        """The defaults for `heads` heads, `max_pages` pages, `observe` rows of `itemsize` bytes."""
        wide = layout.head_dim > 128 or itemsize > 2
        keys = max(layout.tokens, 32 if wide else 64)
        steps = pl.cdiv(max_pages * layout.tokens_per_page(0), keys)
        rows = max(16, min(32 if wide else 64, pl.next_power_of_2(observe)))
        return Blocks(rows, keys, splits=max(1, min(steps, 1024 // heads)), warps=4, stages=2)


def column_sums(
    chunk: Chunk,
    lse: Array,
    observe: int,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    scale: Scale,
    *,
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> ColumnSums:
    """`column_sums` of api.py. The significance is changed in place."""
    b, c = chunk.k.shape[:2]
    slots, itemsize = heads.recent_k.shape[2], chunk.q.dtype.itemsize
    blocks = blocks or Blocks.choose(layout, b, heads.page_table.shape[1], observe, itemsize)
    key_pieces(layout)  # refuse what Triton cannot do before it is called
    inputs = Inputs.of(chunk, pages, heads)
    options = dict(observe=observe, layout=layout, scale=scale, blocks=blocks)
    call = partial(
        pl.pallas_call,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=bool(interpret),
    )
    recent, own = (
        call(
            partial(_exact_kernel, source=source, **options),
            grid=(b, pl.cdiv(n, blocks.keys)),
            out_shape=jax.ShapeDtypeStruct((b, n), jnp.float32),
            name=f"column_sums_{source}",
        )(*inputs, lse)
        for source, n in (("recent", slots), ("chunk", c))
    )
    stored = call(
        partial(_stored_kernel, **options),
        grid=(b, blocks.splits),
        out_shape=jax.ShapeDtypeStruct(pages.significance.shape, jnp.float32),
        input_output_aliases={READ + 1: 0},
        name="column_sums_stored",
    )(*inputs, lse, pages.significance)
    return ColumnSums(stored, recent, own)


def _stored_kernel(*refs, observe: int, layout: PageLayout, scale: Scale, blocks: Blocks):
    """Program (head, split): every `splits`-th step of `blocks.keys` stored tokens, tier by tier.

    Reads the K rows and K metadata of the head's live pages once, and q and log-sum-exp (float32
    [B, G, C]) of the observing rows once a step; adds to the significance float32 [num_pages,
    blocks, T] of live tokens only (8 bytes of traffic a token).
    """
    inputs, lse, significance = Inputs(*refs[:READ]), refs[READ], refs[READ + 2]
    num_pages = inputs.payload.shape[0]
    head, split = pl.program_id(0), pl.program_id(1)
    observes = jnp.minimum(inputs.length[head], observe) > 0
    sums_of = partial(_sums, inputs, lse, layout, scale, observe, blocks, head)
    for tier in range(layout.tiers):
        length = jnp.where(observes, inputs.tier_len[head, tier], 0)

        def add(i, _, tier=tier, length=length):
            step = split + i * blocks.splits
            stored = stored_blocks(inputs, layout, tier, head, length, step, blocks.keys)
            sums = sums_of(stored.keys(), stored.bias())
            # steps past the end name no page twice
            page = jnp.where(stored.live, stored.page, num_pages)
            lanes = jnp.arange(layout.tokens, dtype=jnp.int32)[None, :]
            at = gathered(significance, page[:, None], stored.block[:, None], lanes)
            old = plgpu.load(at, mask=stored.valid, other=0.0)
            plgpu.store(at, old + sums.reshape(stored.valid.shape), mask=stored.valid)
            return None

        steps = pl.cdiv(length, blocks.keys)
        lax.fori_loop(0, pl.cdiv(jnp.maximum(steps - split, 0), blocks.splits), add, None)


def _exact_kernel(
    *refs,
    source: Literal["recent", "chunk"],
    observe: int,
    layout: PageLayout,
    scale: Scale,
    blocks: Blocks,
):
    """Program (head, block): `blocks.keys` keys of the recent window of `inputs.layer` or of the
    chunk. Writes float32 [B, n].
    """
    inputs, lse, out = Inputs(*refs[:READ]), refs[READ], refs[READ + 1]
    c, dtype = inputs.k.shape[1], inputs.q.dtype
    head, first = pl.program_id(0), pl.program_id(1) * blocks.keys
    if source == "chunk":
        key, at = chunk_key_index(first, blocks.keys, head, c)
        live, ref, causal = (key >= c - inputs.length[head]) & (key < c), inputs.k, key
    else:
        slots = inputs.recent_k.shape[2]
        key = first + jnp.arange(blocks.keys, dtype=jnp.int32)
        at = (inputs.layer[0], head, jnp.minimum(key, slots - 1))
        live = key < jnp.minimum(inputs.recent_len[head], slots)
        ref, causal = inputs.recent_k, None
    keys, bias = exact_keys(ref, at, live, layout, dtype), jnp.where(live, 0.0, -jnp.inf)
    sums = _sums(inputs, lse, layout, scale, observe, blocks, head, keys, bias, causal)
    plgpu.store(gathered(out, head, key), sums, mask=key < out.shape[1])


def _sums(
    inputs: Inputs,
    lse,
    layout: PageLayout,
    scale: Scale,
    observe: int,
    blocks: Blocks,
    head,
    keys: Sequence[CodeTile],
    bias: Array,
    causal: Array | None = None,
) -> Array:
    """`exp(logit - lse)` summed over a query head's rows, then max or mean of the group: `[n]`.

    `causal [n]`: number of each key in the chunk, seen by its own row and later ones; None for keys
    that all rows see.
    """
    (_, g, c, _), dtype = inputs.q.shape, inputs.q.dtype
    count = jnp.minimum(inputs.length[head], observe)
    skipped = 0
    if causal is not None:
        skipped = lax.div(jnp.maximum(causal.min() - (c - count), 0), blocks.rows)

    def of_member(member, score: Array) -> Array:
        def add_rows(i, total: Array) -> Array:
            row = c - count + i * blocks.rows + jnp.arange(blocks.rows, dtype=jnp.int32)
            real, at = row < c, (head, member, jnp.minimum(row, c - 1))
            q = [load_rows(inputs.q, at, piece, real, dtype) for piece in key_pieces(layout)]
            logits = logits_of(q, keys, bias, scale)
            if causal is not None:
                logits = jnp.where(causal[None, :] <= row[:, None], logits, -jnp.inf)
            shift = plgpu.load(gathered(lse, *at), mask=real, other=jnp.inf) * LOG2_E
            return total + jnp.exp2(logits - shift[:, None]).sum(axis=0)

        steps = pl.cdiv(count, blocks.rows)
        total = lax.fori_loop(skipped, steps, add_rows, jnp.zeros(bias.shape, jnp.float32))
        return jnp.maximum(score, total) if layout.group == "max" else score + total / g

    return lax.fori_loop(0, g, of_member, jnp.zeros(bias.shape, jnp.float32))
