"""The Triton kernel of decode attention that attends, what it reads and what it leaves behind."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..pages import PageLayout, Pages
from ..support import writes
from .reference import Heads, Sliding
from .stream import Scale
from .triton_blocks import stored_blocks
from .triton_keys import (
    State,
    exact_keys,
    gathered,
    key_pieces,
    load_rows,
    logits_of,
    mix_rows,
    value_pieces,
)

TOKENS_A_SPLIT = 512  # fewer are not worth a program
MOST_SPLITS = 128  # of a head: eight heads then fill a large chip a few times over


@dataclass(frozen=True)
class Blocks:
    """Sizes of one program."""

    rows: int  # query heads of a group, filled up to a power of two of at least 16
    keys: int  # of one step, a power of two of at least 16 and of the tokens of a block
    splits: int  # programs that share the tokens of a head
    steps: int  # most steps of a head: the room for its logits
    logits: str  # dtype in which they are kept between the kernels
    warps: int
    stages: int

    @staticmethod
    def choose(layout: PageLayout, group: int, max_len: int, itemsize: int) -> "Blocks":
        """The defaults for heads of `group` query heads, `max_len` tokens, q of `itemsize` bytes.

        How many heads there are does not matter: the order in which a head's tokens are added must
        not depend on the batch. Logits of bfloat16 queries are kept in float16, relative to the
        largest of their step: half a per cent of a probability at most.
        """
        exact, small = itemsize > 2, layout.head_dim < 128
        # look-ups and rotary embeddings take registers
        few = exact or small or layout.head_dim > 128 or writes("triton", layout) is not None
        keys = max(layout.tokens, 32 if few else 64)
        splits = min(MOST_SPLITS, pl.cdiv(max_len, TOKENS_A_SPLIT))
        return Blocks(
            rows=max(16, pl.next_power_of_2(group)),
            keys=keys,
            splits=splits,
            steps=pl.cdiv(max_len, keys) + layout.tiers,
            logits="float32" if exact else "float16",
            warps=2 if small else 4,
            stages=2,
        )


class Inputs(NamedTuple):
    """The Refs that both kernels read (Arrays outside of them)."""

    q: Any  # float32 or bfloat16 [B, G, d]
    page_table: Any  # int32 [B, max_pages]
    tier_len: Any  # int32 [B, tiers]
    recent_k: Any  # [L, B, slots, d]
    recent_v: Any  # [L, B, slots, d]
    recent_len: Any  # int32 [B]
    layer: Any  # int32 [1]
    query_position: Any  # int32 [B]; read with a sliding window only
    position: Any  # uint16 or int32 [num_pages, blocks, T]; for a sliding window or RoPE
    payload: Any  # uint8 [num_pages, rows, T]
    meta: Any  # float16 [num_pages, meta_rows, T]
    tables: Any  # `Heads.tables`
    frequencies: Any  # float32 [d / 2] of the rotary embedding that keys still need, else None

    @staticmethod
    def of(q: Array, pages: Pages, layout: PageLayout, heads: Heads, sliding: Sliding | None):
        """The arrays in the order of the Refs."""
        meta = pages.meta
        if not meta.size:  # an empty array is no Ref
            meta = jnp.zeros((1, 1, layout.tokens), meta.dtype)
        return Inputs(
            q,
            *heads[:5],
            layer=jnp.reshape(heads.layer, 1),
            query_position=heads.recent_len if sliding is None else sliding.position,
            position=pages.position,
            payload=pages.payload,
            meta=meta,
            tables=heads.tables,
            frequencies=None if layout.rope is None else jnp.asarray(layout.rope, jnp.float32),
        )


class Partials(NamedTuple):
    """What the attending programs leave for the second kernel."""

    maximum: Any  # float32 [B, splits, G], base 2
    total: Any  # float32 [B, splits, G]
    output: Any  # float32 [B, splits, G, d], unnormalised
    logits: Any  # [B, steps, G, keys], base 2, relative to `base`; of the live steps only
    base: Any  # float32 [B, steps, G], the largest logit of a step
    recent_logits: Any  # float32 [B, G, slots], base 2

    @staticmethod
    def shapes(layout: PageLayout, blocks: Blocks, q: tuple[int, ...], slots: int):
        """Their shapes and dtypes, for queries of shape `q`."""
        (b, g, d), splits = q, blocks.splits
        steps, kept = (blocks.steps, g) if layout.scored else (1, 1)
        return Partials(
            float32(b, splits, g),
            float32(b, splits, g),
            float32(b, splits, g, d),
            jax.ShapeDtypeStruct((b, steps, kept, blocks.keys), blocks.logits),
            float32(b, steps, kept),
            float32(b, kept, slots),
        )


@dataclass(frozen=True)
class Task:
    """The static part of a call."""

    layout: PageLayout
    scale: Scale
    window: int | None  # of a sliding window
    blocks: Blocks


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """What a kernel's float32 output looks like."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def attend_kernel(*refs, task: Task):
    """Program (head, split): the query heads of one KV head against its share of the stored tokens;
    the last split takes the window.

    Reads q, the page ids, K and V rows and metadata of its share of the live pages once, and the
    live recent slots of the layer (positions with a sliding window, or to embed keys; what learned
    tables have for its codes); writes `Partials`. DiffKV, arXiv 2412.03131 sec. 6; split and merge
    as in flash decoding.
    """
    count = len(Inputs._fields)
    inputs, out = Inputs(*refs[:count]), Partials(*refs[count:])
    blocks, layout, group = task.blocks, task.layout, inputs.q.shape[1]
    head, split = pl.program_id(0), pl.program_id(1)
    member = jnp.arange(blocks.rows, dtype=jnp.int32)
    real, at = member < group, (head, jnp.minimum(member, group - 1))
    q = [load_rows(inputs.q, at, piece, real, inputs.q.dtype) for piece in key_pieces(layout)]
    state, add = State.empty(blocks.rows, layout), partial(_add_step, q, inputs, out, task, head)
    for tier, (first, stop) in enumerate(shares(inputs.tier_len, task, head, split)):
        state = lax.fori_loop(first, stop, partial(add, tier), state)
    state = _add_recent(state, q, inputs, out, task, head, split)
    _store_partials(state, out, task, head, split)


def shares(tier_len, task: Task, head, split) -> list[tuple[Array, Array]]:
    """Steps of each tier that a split of a head takes: equal parts of all, tier after tier."""
    steps = [pl.cdiv(tier_len[head, tier], task.blocks.keys) for tier in range(task.layout.tiers)]
    each = pl.cdiv(sum(steps), task.blocks.splits)
    found, before = [], 0
    for count in steps:
        first = jnp.clip(split * each - before, 0, count)
        found.append((first, jnp.clip((split + 1) * each - before, 0, count)))
        before = before + count
    return found


def place_of(tier: int, step, blocks: Blocks):
    """Where a step's logits are kept: tier 0 from the left, tier 1 from the right, as in tables."""
    return step if tier == 0 else blocks.steps - 1 - step


def _add_step(
    q, inputs: Inputs, out: Partials, task: Task, head, tier: int, step, state: State
) -> State:
    """`blocks.keys` stored tokens of a tier."""
    length, keys = inputs.tier_len[head, tier], task.blocks.keys
    stored = stored_blocks(inputs, task.layout, tier, head, length, step, keys)
    bias = stored.bias()
    if task.window is not None:
        seen = stored.positions() > inputs.query_position[head] - task.window
        bias = jnp.where(seen, bias, -jnp.inf)
    logits = logits_of(q, stored.keys(), bias, task.scale)
    if task.layout.scored:
        at, largest = (head, place_of(tier, step, task.blocks)), logits.max(axis=1)
        largest = jnp.where(largest == -jnp.inf, 0.0, largest)
        member = jnp.arange(task.blocks.rows, dtype=jnp.int32)
        plgpu.store(gathered(out.base, *at, member), largest, mask=member < out.base.shape[2])
        relative, column = logits - largest[:, None], jnp.arange(keys, dtype=jnp.int32)
        _keep(out.logits, at, relative, column, None)
    return state.add(logits, stored.mix)


def _keep(ref, at: tuple, logits: Array, column: Array, live: Array | None) -> None:
    """Store the rows of `logits [rows, n]` that are query heads at `ref[*at, row, column]`."""
    member = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    mask = jnp.broadcast_to(member < ref.shape[-2], logits.shape)
    mask = mask if live is None else mask & live[None, :]
    plgpu.store(gathered(ref, *at, member, column[None, :]), logits.astype(ref.dtype), mask=mask)


def _add_recent(state: State, q, inputs: Inputs, out: Partials, task: Task, head, split) -> State:
    """The live slots of the recent window; dead ones are never read."""
    slots, dtype, keys = inputs.recent_k.shape[2], inputs.q.dtype, task.blocks.keys
    length, layer = jnp.minimum(inputs.recent_len[head], slots), inputs.layer[0]
    mine = jnp.where(split == task.blocks.splits - 1, length, 0)

    def body(step, state: State) -> State:
        slot = step * keys + jnp.arange(keys, dtype=jnp.int32)
        live = slot < length
        seen = live if task.window is None else live & (length - 1 - slot < task.window)
        at = (layer, head, jnp.minimum(slot, slots - 1))
        tiles = exact_keys(inputs.recent_k, at, live, task.layout, dtype)
        logits = logits_of(q, tiles, jnp.where(seen, 0.0, -jnp.inf), task.scale)
        if task.layout.scored:
            _keep(out.recent_logits, (head,), logits, slot, live)
        return state.add(logits, mix_rows(inputs.recent_v, at, live, task.layout, dtype))

    return lax.fori_loop(0, pl.cdiv(mine, keys), body, state)


def _store_partials(state: State, out: Partials, task: Task, head, split) -> None:
    member = jnp.arange(task.blocks.rows, dtype=jnp.int32)
    real = member < out.maximum.shape[2]
    plgpu.store(gathered(out.maximum, head, split, member), state.maximum, mask=real)
    plgpu.store(gathered(out.total, head, split, member), state.total, mask=real)
    for (first, size), piece in zip(value_pieces(task.layout), state.output, strict=True):
        channel = first + jnp.arange(size, dtype=jnp.int32)[None, :]
        at = gathered(out.output, head, split, member[:, None], channel)
        plgpu.store(at, piece, mask=jnp.broadcast_to(real[:, None], piece.shape))
