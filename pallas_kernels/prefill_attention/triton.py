"""Attention of a prompt chunk as one Triton kernel: pages, window, chunk in one online softmax."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..decode_attention.reference import Heads
from ..decode_attention.triton_blocks import stored_blocks
from ..decode_attention.triton_keys import (
    LN_2,
    State,
    check_pool,
    chunk_key_index,
    exact_keys,
    gathered,
    key_pieces,
    load_rows,
    logits_of,
    mix_rows,
    row_channels,
    value_pieces,
)
from ..pages import PageLayout, Pages
from .reference import Chunk, Scale


@dataclass(frozen=True)
class Blocks:
    """Sizes of one program."""

    rows: int  # pairs of row and query head, a power of two of at least 16
    keys: int  # of one step, a power of two of at least 16 and of the tokens of a block
    warps: int
    stages: int

    @staticmethod
    def choose(layout: PageLayout, group: int, rows: int, itemsize: int) -> "Blocks":
        """The defaults for a chunk of `rows` rows, `group` query heads, values of `itemsize` bytes.

        64 keys a step fit the registers of an H100 too, but spill on A100 and L40.
        """
        wide = layout.head_dim > 128 or itemsize > 2
        pairs = max(16, min(64 if wide else 128, pl.next_power_of_2(group * rows)))
        return Blocks(
            rows=pairs, keys=max(layout.tokens, 32), warps=8 if pairs > 32 else 4, stages=2
        )


class Inputs(NamedTuple):
    """The Refs that the kernel reads (Arrays outside of it)."""

    q: Any  # float32 or bfloat16 [B, G, C, d]
    k: Any  # [B, C, d]
    v: Any  # [B, C, d]
    length: Any  # int32 [B]
    page_table: Any  # int32 [B, max_pages]
    tier_len: Any  # int32 [B, tiers]
    recent_k: Any  # [L, B, slots, d]
    recent_v: Any  # [L, B, slots, d]
    recent_len: Any  # int32 [B]
    layer: Any  # int32 [1]
    payload: Any  # uint8 [num_pages, rows, T]
    meta: Any  # float16 [num_pages, meta_rows, T]

    @staticmethod
    def of(chunk: Chunk, pages: Pages, heads: Heads) -> "Inputs":
        """The arrays in the order of the Refs. Raises ValueError if the pool is beyond Triton."""
        check_pool(pages)
        meta = pages.meta
        if not meta.size:  # an empty array is no Ref
            meta = jnp.zeros((1, 1, meta.shape[2]), meta.dtype)
        return Inputs(*chunk, *heads[:5], jnp.reshape(heads.layer, 1), pages.payload, meta)


def prefill_attention(
    chunk: Chunk,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    scale: Scale,
    *,
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> tuple[Array, Array]:
    """`prefill_attention` of api.py."""
    b, g, c, d = chunk.q.shape
    blocks = blocks or Blocks.choose(layout, g, c, chunk.q.dtype.itemsize)
    for refuse in (key_pieces, value_pieces):  # what Triton cannot do, before it is called
        refuse(layout)
    return pl.pallas_call(
        partial(_kernel, layout=layout, scale=scale, blocks=blocks),
        grid=(b, pl.cdiv(g * c, blocks.rows)),
        out_shape=(
            jax.ShapeDtypeStruct((b, g, c, d), jnp.float32),
            jax.ShapeDtypeStruct((b, g, c), jnp.float32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=bool(interpret),
        name="prefill_attention",
    )(*Inputs.of(chunk, pages, heads))


def _kernel(*refs, layout: PageLayout, scale: Scale, blocks: Blocks):
    """Program (head, block): `blocks.rows` (row, query head) pairs against every key they see.

    Pair f is row f // G of query head f % G, so that a page is read and unpacked once for all G
    heads. Reads the head's live blocks of pages (payload and metadata, once a program), live recent
    slots of its layer, the chunk's K and V up to its last row; writes its rows of the output (4 * d
    bytes each) and of the log-sum-exp. The latest rows, which see most, go first.
    """
    inputs = Inputs(*refs[: len(Inputs._fields)])
    out, lse = refs[len(Inputs._fields) :]
    _, g, c, _ = inputs.q.shape
    head, block = pl.program_id(0), pl.num_programs(1) - 1 - pl.program_id(1)
    pair = block * blocks.rows + jnp.arange(blocks.rows, dtype=jnp.int32)
    row, member, real = lax.div(pair, jnp.int32(g)), lax.rem(pair, jnp.int32(g)), pair < g * c
    last_row = jnp.minimum(lax.div((block + 1) * blocks.rows - 1, g), c - 1)
    attends = last_row >= c - inputs.length[head]  # else all rows are padding
    at = (head, member, row)
    q = [load_rows(inputs.q, at, piece, real, inputs.q.dtype) for piece in key_pieces(layout)]

    state = State.empty(blocks.rows, layout)
    for tier in range(layout.tiers):
        state = _add_tier(state, q, inputs, layout, tier, head, scale, blocks, attends)
    state = _add_recent(state, q, inputs, layout, head, scale, blocks, attends)
    state = _add_own(state, q, inputs, layout, head, scale, blocks, row, last_row, attends)

    some = state.total > 0
    total = jnp.where(some, state.total, 1.0)
    for channels, piece in zip(value_pieces(layout), state.output, strict=True):
        rows, values = row_channels(out, at, channels), piece / total[:, None]
        plgpu.store(rows, values, mask=jnp.broadcast_to(real[:, None], piece.shape))
    logsumexp = jnp.where(some, state.maximum * LN_2 + jnp.log(total), jnp.inf)
    plgpu.store(gathered(lse, *at), logsumexp, mask=real)


def _add_tier(
    state: State,
    q,
    inputs: Inputs,
    layout: PageLayout,
    tier: int,
    head,
    scale: Scale,
    blocks: Blocks,
    attends,
) -> State:
    """The stored tokens of a tier, `blocks.keys` at a time."""
    length = jnp.where(attends, inputs.tier_len[head, tier], 0)

    def body(step, state: State) -> State:
        stored = stored_blocks(inputs, layout, tier, head, length, step, blocks.keys)
        logits = logits_of(q, stored.keys(), stored.bias(), scale)
        return state.add(logits, stored.mix)

    return lax.fori_loop(0, pl.cdiv(length, blocks.keys), body, state)


def _add_recent(
    state: State, q, inputs: Inputs, layout: PageLayout, head, scale: Scale, blocks: Blocks, attends
) -> State:
    """The live slots of the recent window; dead ones are never read."""
    slots, dtype = inputs.recent_k.shape[2], inputs.q.dtype
    length = jnp.where(attends, jnp.minimum(inputs.recent_len[head], slots), 0)
    layer = inputs.layer[0]

    def body(step, state: State) -> State:
        slot = step * blocks.keys + jnp.arange(blocks.keys, dtype=jnp.int32)
        live = slot < length
        at = (layer, head, jnp.minimum(slot, slots - 1))
        keys = exact_keys(inputs.recent_k, at, live, layout, dtype)
        logits = logits_of(q, keys, jnp.where(live, 0.0, -jnp.inf), scale)
        return state.add(logits, mix_rows(inputs.recent_v, at, live, layout, dtype))

    return lax.fori_loop(0, pl.cdiv(length, blocks.keys), body, state)


def _add_own(
    state: State,
    q,
    inputs: Inputs,
    layout: PageLayout,
    head,
    scale,
    blocks: Blocks,
    row,
    last_row,
    attends,
) -> State:
    """The chunk's own keys, from its first token to the block of the last row; causal."""
    c, dtype = inputs.k.shape[1], inputs.q.dtype
    first_key = c - inputs.length[head]

    def body(step, state: State) -> State:
        key, at = chunk_key_index(step * blocks.keys, blocks.keys, head, c)
        keys = exact_keys(inputs.k, at, key < c, layout, dtype)
        logits = logits_of(q, keys, jnp.where(key >= first_key, 0.0, -jnp.inf), scale)
        logits = jnp.where(key[None, :] <= row[:, None], logits, -jnp.inf)
        return state.add(logits, mix_rows(inputs.v, at, key < c, layout, dtype))

    stop = jnp.where(attends, pl.cdiv(last_row + 1, blocks.keys), 0)
    return lax.fori_loop(lax.div(jnp.maximum(first_key, 0), blocks.keys), stop, body, state)
