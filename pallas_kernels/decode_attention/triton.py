"""Decode attention as two Triton kernels: one attends, split over a head's tokens, one scores."""

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
from .triton_keys import (
    CodeTile,
    State,
    check_pool,
    gathered,
    key_pieces,
    load_rows,
    logits_of,
    matmul,
    stored_blocks,
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


class Partials(NamedTuple):
    """What the attending programs leave for the second kernel."""

    maximum: Any  # float32 [B, splits, G], base 2
    total: Any  # float32 [B, splits, G]
    output: Any  # float32 [B, splits, G, d], unnormalised
    logits: Any  # [B, steps, G, keys], base 2, relative to `base`; of the live steps only
    base: Any  # float32 [B, steps, G], the largest logit of a step
    recent_logits: Any  # float32 [B, G, slots], base 2


@dataclass(frozen=True)
class Task:
    """The static part of a call."""

    layout: PageLayout
    scale: Scale
    window: int | None  # of a sliding window
    blocks: Blocks


def decode_attention(
    q: Array,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    *,
    max_len: int,
    sm_scale: float,
    logits_soft_cap: float | None = None,
    sliding: Sliding | None = None,
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> tuple[Array, Array, Array]:
    """`decode_attention` of api.py: two launches and a few XLA operations on the partial results;
    the significance is changed in place.

    Besides what must move, the logits of a scored layout go to device memory and back once (4 bytes
    a token and query head for bfloat16 queries, 8 for float32), and the partial results, 8 + 4 * d
    bytes a split and query head.
    """
    b, g, d = q.shape
    slots = heads.recent_k.shape[2]
    blocks = blocks or Blocks.choose(layout, g, max_len, q.dtype.itemsize)
    for refuse in (key_pieces, value_pieces):  # what Triton cannot do, before it is called
        refuse(layout)
    check_pool(pages)
    task = Task(
        layout, Scale(sm_scale, logits_soft_cap), None if sliding is None else sliding.size, blocks
    )
    # an empty array is no Ref
    meta = pages.meta if pages.meta.size else jnp.zeros((1, 1, layout.tokens), pages.meta.dtype)
    seen = heads.recent_len if sliding is None else sliding.position
    frequencies = None if layout.rope is None else jnp.asarray(layout.rope, jnp.float32)
    inputs = Inputs(
        q,
        *heads[:5],
        jnp.reshape(heads.layer, 1),
        seen,
        pages.position,
        pages.payload,
        meta,
        heads.tables,
        frequencies,
    )
    float32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    steps, kept = (blocks.steps, g) if layout.scored else (1, 1)
    partials = Partials(
        float32((b, blocks.splits, g)),
        float32((b, blocks.splits, g)),
        float32((b, blocks.splits, g, d)),
        jax.ShapeDtypeStruct((b, steps, kept, blocks.keys), blocks.logits),
        float32((b, steps, kept)),
        float32((b, kept, slots)),
    )
    call = partial(pl.pallas_call, interpret=bool(interpret))
    params = plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
    left = call(
        partial(_attend_kernel, task=task),
        grid=(b, blocks.splits),
        out_shape=partials,
        compiler_params=params,
        name="decode_attend",
    )(*inputs)
    out, lse = _merged(left)
    if not layout.scored:
        return out, pages.significance, jnp.zeros((b, slots), jnp.float32)
    recent, significance = call(
        partial(_score_kernel, task=task),
        grid=(b, blocks.splits),
        out_shape=(float32((b, slots)), float32(pages.significance.shape)),
        input_output_aliases={8: 1},
        compiler_params=params,
        name="decode_score",
    )(
        inputs.page_table,
        inputs.tier_len,
        inputs.recent_len,
        lse,
        *left[3:],
        inputs.payload,
        pages.significance,
    )
    return out, significance, recent


def _merged(left: Partials) -> tuple[Array, Array]:
    """Join the splits: output float32 `[B, G, d]`, base-2 log-sum-exp `[B, G]`, +inf if no keys."""
    maximum = left.maximum.max(axis=1)
    safe = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    weight = jnp.exp2(left.maximum - safe[:, None])
    total = (left.total * weight).sum(axis=1)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    output = (left.output * weight[..., None]).sum(axis=1) / total[..., None]
    return output, jnp.where(some, safe + jnp.log2(total), jnp.inf)


def _attend_kernel(*refs, task: Task):
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
    state = State(
        jnp.full((blocks.rows,), -jnp.inf, jnp.float32),
        jnp.zeros((blocks.rows,), jnp.float32),
        tuple(jnp.zeros((blocks.rows, size), jnp.float32) for _, size in value_pieces(layout)),
    )
    for tier, (first, stop) in enumerate(_shares(inputs.tier_len, task, head, split)):
        state = lax.fori_loop(
            first,
            stop,
            partial(_add_step, q=q, inputs=inputs, out=out, task=task, tier=tier, head=head),
            state,
        )
    state = _add_recent(state, q, inputs, out, task, head, split)
    _store_partials(state, out, task, head, split)


def _shares(tier_len, task: Task, head, split) -> list[tuple[Array, Array]]:
    """Steps of each tier that a split of a head takes: equal parts of all, tier after tier."""
    steps = [pl.cdiv(tier_len[head, tier], task.blocks.keys) for tier in range(task.layout.tiers)]
    each = pl.cdiv(sum(steps), task.blocks.splits)
    shares, before = [], 0
    for count in steps:
        shares.append(
            (
                jnp.clip(split * each - before, 0, count),
                jnp.clip((split + 1) * each - before, 0, count),
            )
        )
        before = before + count
    return shares


def _place(tier: int, step, blocks: Blocks):
    """Where a step's logits are kept: tier 0 from the left, tier 1 from the right, as in tables."""
    return step if tier == 0 else blocks.steps - 1 - step


def _add_step(
    step, state: State, *, q, inputs: Inputs, out: Partials, task: Task, tier: int, head
) -> State:
    """`blocks.keys` stored tokens of a tier."""
    stored = stored_blocks(
        inputs, task.layout, tier, head, inputs.tier_len[head, tier], step, task.blocks.keys
    )
    bias = stored.bias()
    if task.window is not None:
        bias = jnp.where(
            stored.positions() > inputs.query_position[head] - task.window, bias, -jnp.inf
        )
    logits = logits_of(q, stored.keys(), bias, task.scale)
    if task.layout.scored:
        at, largest = (head, _place(tier, step, task.blocks)), logits.max(axis=1)
        largest = jnp.where(largest == -jnp.inf, 0.0, largest)
        member = jnp.arange(task.blocks.rows, dtype=jnp.int32)
        plgpu.store(gathered(out.base, *at, member), largest, mask=member < out.base.shape[2])
        _keep(
            out.logits,
            at,
            logits - largest[:, None],
            jnp.arange(task.blocks.keys, dtype=jnp.int32),
            None,
        )
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
        tiles = [
            CodeTile(load_rows(inputs.recent_k, at, piece, live, dtype).T)
            for piece in key_pieces(task.layout)
        ]
        logits = logits_of(q, tiles, jnp.where(seen, 0.0, -jnp.inf), task.scale)
        if task.layout.scored:
            _keep(out.recent_logits, (head,), logits, slot, live)

        def mix(weights: Array) -> list[Array]:
            weights = weights.astype(dtype)
            return [
                matmul(weights, load_rows(inputs.recent_v, at, piece, live, dtype))
                for piece in value_pieces(task.layout)
            ]

        return state.add(logits, mix)

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


def _score_kernel(
    page_table,
    tier_len,
    recent_len,
    lse,
    logits,
    base,
    recent_logits,
    payload,
    significance_in,
    recent,
    significance,
    *,
    task: Task,
):
    """Program (head, split): the probabilities of its share of the tokens, reduced over the group,
    added to their significance in place.

    Reads the base-2 log-sum-exp float32 `[B, G]` and the kept logits (2 or 4 bytes a token and
    query head); reads and writes the significance of live tokens (8 bytes a token). The first split
    also writes the recent tokens' probabilities.
    """
    del significance_in
    blocks, layout, group, slots = task.blocks, task.layout, logits.shape[2], recent.shape[1]
    head, split = pl.program_id(0), pl.program_id(1)
    number = jnp.arange(blocks.rows, dtype=jnp.int32)
    member = jnp.minimum(number, group - 1)
    # what fills up the group has probability 0
    shift = plgpu.load(gathered(lse, head, member), mask=number < group, other=jnp.inf)
    inputs = Inputs(*(None,) * len(Inputs._fields))._replace(page_table=page_table, payload=payload)

    def score(step, _, tier: int):
        stored = stored_blocks(inputs, layout, tier, head, tier_len[head, tier], step, blocks.keys)
        column = jnp.arange(blocks.keys, dtype=jnp.int32)[None, :]
        place = _place(tier, step, blocks)
        kept = plgpu.load(gathered(logits, head, place, member[:, None], column)).astype(
            jnp.float32
        )
        largest = plgpu.load(gathered(base, head, place, member))
        scores = _over_group(jnp.exp2(kept + (largest - shift)[:, None]), layout, group).reshape(
            stored.valid.shape
        )
        page = jnp.where(stored.live, stored.page, significance.shape[0])  # past the end: none
        lanes = jnp.arange(layout.tokens, dtype=jnp.int32)[None, :]
        at = gathered(significance, page[:, None], stored.block[:, None], lanes)
        plgpu.store(at, plgpu.load(at, mask=stored.valid, other=0.0) + scores, mask=stored.valid)

    for tier, (first, stop) in enumerate(_shares(tier_len, task, head, split)):
        lax.fori_loop(first, stop, partial(score, tier=tier), None)

    @pl.when(split == 0)
    def _():
        slot = jnp.arange(pl.next_power_of_2(slots), dtype=jnp.int32)
        live = slot < jnp.minimum(recent_len[head], slots)
        mask = jnp.broadcast_to(live[None, :], (blocks.rows, live.size))
        kept = plgpu.load(
            gathered(recent_logits, head, member[:, None], jnp.minimum(slot, slots - 1)[None, :]),
            mask=mask,
            other=-jnp.inf,
        )
        plgpu.store(
            gathered(recent, head, slot),
            _over_group(jnp.exp2(kept - shift[:, None]), layout, group),
            mask=slot < slots,
        )


def _over_group(probabilities: Array, layout: PageLayout, group: int) -> Array:
    """One score a key from `[rows, n]`, `group` of them query heads, the others zeros: `[n]`."""
    return probabilities.max(axis=0) if layout.group == "max" else probabilities.sum(axis=0) / group
