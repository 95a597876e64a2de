"""The recent window on TPUs: one token in, the oldest out, in place, through VMEM by DMA."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dispatch import tpu_interpreter

# rows of a tile in HBM (bfloat16: pairs of rows in a word); a DMA to or from HBM moves whole tiles
TILE_ROWS = 8
BUFFER_BYTES = 4 << 20  # VMEM that the windows of the heads in flight may take


@dataclass(frozen=True)
class Blocks:
    """How many heads one grid step handles: a multiple of 8, or all."""

    heads: int

    @staticmethod
    def choose(heads: int, head_bytes: int) -> "Blocks":
        """The defaults for `heads` heads of which each takes `head_bytes` of VMEM."""
        most = max(8, BUFFER_BYTES // head_bytes // 8 * 8)
        return Blocks(heads if heads <= most else most)


class _Append(NamedTuple):
    """Refs of `_append`; `heads` are those of a grid step."""

    layer: Any  # SMEM int32 [1]
    slot: Any  # SMEM int32 [B]
    k: Any  # float32 [heads, d], rounded to the windows' dtype
    v: Any  # float32 [heads, d]
    old_k: Any  # aliased with recent_k
    old_v: Any
    recent_k: Any  # HBM [L, B, N, d]
    recent_v: Any
    k_rows: Any  # [heads, rows, d]
    v_rows: Any
    arrived: Any  # DMA semaphore
    left: Any  # DMA semaphore


class _Shift(NamedTuple):
    """Refs of `_shift`; `heads` are those of a grid step."""

    layer: Any  # SMEM int32 [1]
    shift: Any  # SMEM int32 [B]
    old_k: Any  # aliased with recent_k
    old_v: Any
    recent_k: Any  # HBM [L, B, N, d]
    recent_v: Any
    k_window: Any  # [2, heads, N, d]
    v_window: Any
    arrived: Any  # DMA semaphores [2]
    left: Any  # DMA semaphores [2]
    shift_column: Any = None  # int32 [B, 1]
    old_significance: Any = None  # float32 [B, N]
    significance: Any = None  # float32 [B, N]


# the Refs in the order in which `_shift` gets them, and those that are there when scored
_SHIFT = """layer shift shift_column old_k old_v old_significance recent_k recent_v significance
k_window v_window arrived left""".split()
_SCORED = ("shift_column", "old_significance", "significance")


def append_recent(
    recent_k: Array,
    recent_v: Array,
    layer: Array,
    k: Array,
    v: Array,
    slot: Array,
    *,
    interpret: bool | Literal["checked"],
    blocks: Blocks | None = None,
) -> tuple[Array, Array]:
    """`append_recent` of api.py on TPUs."""
    (_, batch, slots, head_dim), dtype = recent_k.shape, recent_k.dtype
    rows = TILE_ROWS if slots % TILE_ROWS == 0 else slots
    blocks = blocks or Blocks.choose(batch, 2 * rows * head_dim * dtype.itemsize)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    token = pl.BlockSpec((blocks.heads, head_dim), lambda step, *_: (step, 0))
    rounded = (x.astype(dtype).astype(jnp.float32) for x in (k, v))
    return pl.pallas_call(
        partial(_append, heads=blocks.heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(batch, blocks.heads),),
            in_specs=[token, token, hbm, hbm],
            out_specs=[hbm, hbm],
            scratch_shapes=[pltpu.VMEM((blocks.heads, rows, head_dim), dtype)] * 2
            + [pltpu.SemaphoreType.DMA] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (recent_k, recent_v)],
        input_output_aliases={4: 0, 5: 1},
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=4 * batch * rows * head_dim * dtype.itemsize
        ),
        interpret=tpu_interpreter(interpret),
        name="append_recent",
    )(layer.reshape(1), slot, *rounded, recent_k, recent_v)


def _append(*refs: Any, heads: int) -> None:
    """Put one token `[d]` of K and V of each head of a grid step into slot `slot[head]` of layer
    `layer` of the windows.

    A DMA moves whole tiles, so the tile (8 slots; the whole window where N is no multiple of 8)
    that holds the slot is read, changed in VMEM and written. All reads are in flight at once, then
    all writes. Bytes a head: 2 (K, V) * 2 * rows * d * itemsize; none where the slot is not in `[0,
    N)`.
    """
    r = _Append(*refs)
    layer, first, (_, batch, slots, _) = r.layer[0], pl.program_id(0) * heads, r.recent_k.shape
    rows = r.k_rows.shape[1]
    row = lax.broadcasted_iota(jnp.int32, r.k_rows.shape[1:], 0)

    def each_head(act) -> None:
        def one(i: Array, none: None) -> None:
            head = first + i
            slot = r.slot[jnp.minimum(head, batch - 1)]
            start = 0 if rows == slots else pl.multiple_of(slot // rows * rows, rows)

            @pl.when((head < batch) & (slot >= 0) & (slot < slots))
            def _():
                tiles = [x.at[layer, head, pl.ds(start, rows)] for x in (r.recent_k, r.recent_v)]
                act(i, slot - start, tiles)

        lax.fori_loop(0, heads, one, None)

    def read(i: Array, tiles: list) -> list:
        pairs = zip(tiles, (r.k_rows, r.v_rows), strict=True)
        return [pltpu.make_async_copy(far, near.at[i], r.arrived) for far, near in pairs]

    def written(i: Array, tiles: list) -> list:
        pairs = zip(tiles, (r.k_rows, r.v_rows), strict=True)
        return [pltpu.make_async_copy(near.at[i], far, r.left) for far, near in pairs]

    def change(i: Array, at: Array, tiles: list) -> None:
        for token, rows in ((r.k, r.k_rows), (r.v, r.v_rows)):
            new = jnp.where(row == at, token[pl.ds(i, 1), :], rows[i].astype(jnp.float32))
            rows[i] = new.astype(rows.dtype)
        for copy in written(i, tiles):
            copy.start()

    each_head(lambda i, _, tiles: [copy.start() for copy in read(i, tiles)])
    each_head(lambda i, _, tiles: [copy.wait() for copy in read(i, tiles)])
    each_head(change)
    each_head(lambda i, _, tiles: [copy.wait() for copy in written(i, tiles)])


def shift_recent(
    recent_k: Array,
    recent_v: Array,
    significance: Array,
    layer: Array,
    shift: Array,
    *,
    interpret: bool | Literal["checked"],
    blocks: Blocks | None = None,
) -> tuple[Array, Array, Array]:
    """`shift_recent` of api.py on TPUs."""
    (_, batch, slots, head_dim), dtype = recent_k.shape, recent_k.dtype
    scored = significance.shape[2] > 0
    blocks = blocks or Blocks.choose(batch, 4 * slots * head_dim * dtype.itemsize)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    column = pl.BlockSpec((batch, 1), lambda *_: (0, 0))
    scores = pl.BlockSpec((None, batch, slots), lambda step, layer, _: (layer[0], 0, 0))
    windows = [recent_k, recent_v, significance] if scored else [recent_k, recent_v]
    names = tuple(name for name in _SHIFT if scored or name not in _SCORED)
    shifted = pl.pallas_call(
        partial(_shift, names=names, heads=blocks.heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(batch, blocks.heads),),
            in_specs=[column, hbm, hbm, scores] if scored else [hbm, hbm],
            out_specs=[hbm, hbm, scores] if scored else [hbm, hbm],
            scratch_shapes=[pltpu.VMEM((2, blocks.heads, slots, head_dim), dtype)] * 2
            + [pltpu.SemaphoreType.DMA((2,))] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in windows],
        input_output_aliases={2 + scored + i: i for i in range(len(windows))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=4 * batch * slots * head_dim * dtype.itemsize
        ),
        interpret=tpu_interpreter(interpret),
        name="shift_recent",
    )(layer.reshape(1), shift, *([shift[:, None]] if scored else []), *windows)
    return shifted[0], shifted[1], shifted[2] if scored else significance


def _shift(*refs: Any, names: tuple[str, ...], heads: int) -> None:
    """Move the windows of the heads of a grid step up by `shift[head]` slots, zeros behind;
    `_Shift` says what there is.

    The windows `[N, d]` come into VMEM by DMA while those of the step before are moved (two
    buffers). Bytes a head: 2 (K, V) * 2 * N * d * itemsize, none where the shift is 0;
    significance, 8 N bytes a head, is always rewritten.
    """
    r = _Shift(**dict(zip(names, refs, strict=True)))
    step, steps, layer = pl.program_id(0), pl.num_programs(0), r.layer[0]
    batch = r.recent_k.shape[1]

    def each_head(step: Array, act) -> None:
        def one(i: Array, none: None) -> None:
            head = step * heads + i
            shift = r.shift[jnp.minimum(head, batch - 1)]

            @pl.when((head < batch) & (shift != 0))
            def _():
                act(i, shift, [x.at[layer, head] for x in (r.recent_k, r.recent_v)])

        lax.fori_loop(0, heads, one, None)

    def read(step: Array, i: Array, windows: list) -> list:
        near = [x.at[step % 2, i] for x in (r.k_window, r.v_window)]
        pairs = zip(windows, near, strict=True)
        return [pltpu.make_async_copy(far, to, r.arrived.at[step % 2]) for far, to in pairs]

    def written(step: Array, i: Array, windows: list) -> list:
        near = [x.at[step % 2, i] for x in (r.k_window, r.v_window)]
        pairs = zip(windows, near, strict=True)
        return [pltpu.make_async_copy(to, far, r.left.at[step % 2]) for far, to in pairs]

    def start_reads(step: Array) -> None:
        each_head(step, lambda i, _, windows: [copy.start() for copy in read(step, i, windows)])

    def await_writes(step: Array) -> None:
        each_head(step, lambda i, _, windows: [copy.wait() for copy in written(step, i, windows)])

    def move(i: Array, shift: Array, windows: list) -> None:
        for window in (r.k_window, r.v_window):
            moved = _up(window[step % 2, i].astype(jnp.float32), shift)
            window[step % 2, i] = moved.astype(window.dtype)
        for copy in written(step, i, windows):
            copy.start()

    pl.when(step == 0)(lambda: start_reads(step))
    pl.when(step > 0)(lambda: await_writes(step - 1))
    pl.when(step + 1 < steps)(lambda: start_reads(step + 1))
    each_head(step, lambda i, _, windows: [copy.wait() for copy in read(step, i, windows)])
    each_head(step, move)
    if r.significance is not None:

        @pl.when(step == 0)  # of all heads: the block stays in VMEM to the last step
        def _():
            r.significance[...] = _left(r.old_significance[...], r.shift_column[...])

    pl.when(step + 1 == steps)(lambda: await_writes(step))


def _up(window: Array, shift: Array) -> Array:
    """float32 `[N, d]` with its rows moved up by `shift`, zeros behind."""
    slots = window.shape[0]
    row = lax.broadcasted_iota(jnp.int32, window.shape, 0)
    return jnp.where(row + shift < slots, pltpu.roll(window, slots - shift, 0), 0)


def _left(scores: Array, shift: Array) -> Array:
    """float32 `[B, N]` with the lanes of each row moved left by `shift [B, 1]`, zeros behind, one
    bit of the shift after another.
    """
    slots = scores.shape[1]
    for bit in range(slots.bit_length()):
        step = min(1 << bit, slots)
        kept = [scores[:, step:]] if step < slots else []
        zeros = jnp.zeros((scores.shape[0], step), scores.dtype)
        moved = jnp.concatenate([*kept, zeros], axis=1)
        scores = jnp.where((shift >> bit) & 1 == 1, moved, scores)
    return scores
