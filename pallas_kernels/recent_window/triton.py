"""The recent window on GPUs (Triton): one token in, the oldest out, in place."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclass(frozen=True)
class Blocks:
    """A program of `shift_recent`: `channels` (a power of two) of a head's window, all slots."""

    channels: int
    warps: int

    @staticmethod
    def choose(slots: int, itemsize: int) -> "Blocks":
        """The defaults: 64 bytes of a slot, fewer for long windows, at most 64 values a thread."""
        padded = pl.next_power_of_2(slots)
        channels = max(4, min(64 // itemsize, 2**14 // padded))
        return Blocks(channels, max(1, min(8, padded * channels // 2**10)))


class _Token(NamedTuple):
    """What `_append` reads beside the windows."""

    layer: Any  # int32 [1]
    slot: Any  # int32 [B]
    k: Any  # [B, d]
    v: Any  # [B, d]


class _Windows(NamedTuple):
    """The windows of all layers, input and output in one."""

    k: Any  # [L, B, N, d]
    v: Any  # [L, B, N, d]
    significance: Any = None  # float32 [L, B, N], None when the policy does not score


def append_recent(
    recent_k: Array,
    recent_v: Array,
    layer: Array,
    k: Array,
    v: Array,
    slot: Array,
    *,
    interpret: bool | Literal["checked"],
    blocks: None = None,
) -> tuple[Array, Array]:
    """`append_recent` of api.py on GPUs: one program a head. There is no block size to choose."""
    del blocks
    token, windows = _Token(layer.reshape(1), slot, k, v), _Windows(recent_k, recent_v)
    return pl.pallas_call(
        _append,
        grid=(recent_k.shape[1],),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (recent_k, recent_v)],
        input_output_aliases={len(token): 0, len(token) + 1: 1},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=bool(interpret),
        name="append_recent",
    )(*token, windows.k, windows.v)


def _append(*refs) -> None:
    """Copy one head's K and V `[d]` to slot `slot[head]` of layer `layer` of the windows `[L, B, N,
    d]`, cast to their dtype.

    Reads and writes 2 d values a head; nothing where the slot is not in `[0, N)`. The aliased
    inputs `refs[4:6]` are the outputs.
    """
    token, windows = _Token(*refs[:4]), _Windows(*refs[6:])
    head, (_, _, slots, head_dim) = pl.program_id(0), windows.k.shape
    layer, slot = token.layer[0], token.slot[head]
    channels = jnp.arange(pl.next_power_of_2(head_dim))

    @pl.when((slot >= 0) & (slot < slots))
    def _():
        for new, window in ((token.k, windows.k), (token.v, windows.v)):
            value = plgpu.load(new.at[head, channels], mask=channels < head_dim, other=0)
            plgpu.store(
                window.at[layer, head, slot, channels],
                value.astype(window.dtype),
                mask=channels < head_dim,
            )


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
    """`shift_recent` of api.py on GPUs: one program a head and range of channels."""
    (_, heads, slots, head_dim), scored = recent_k.shape, significance.shape[2] > 0
    blocks = Blocks.choose(slots, recent_k.dtype.itemsize) if blocks is None else blocks
    windows = (recent_k, recent_v, significance) if scored else (recent_k, recent_v)
    shifted = pl.pallas_call(
        partial(_shift, channels=blocks.channels, interpret=bool(interpret)),
        grid=(heads, pl.cdiv(head_dim, blocks.channels)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in windows],
        input_output_aliases={2 + i: i for i in range(len(windows))},
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=bool(interpret),
        name="shift_recent",
    )(layer.reshape(1), shift, *windows)
    return shifted[0], shifted[1], shifted[2] if scored else significance


def _shift(layer_ref: Any, shift_ref: Any, *refs: Any, channels: int, interpret: bool) -> None:
    """Move a range of channels of one head's window up by `shift[head]` slots, zeros behind; the
    first range moves significance, too.

    `layer_ref` int32 [1], `shift_ref` int32 [B]. Reads and writes 2 N values a channel and 4 N
    bytes of significance; nothing where the shift is 0. A program loads all it will overwrite
    before it stores: no other program touches those bytes.
    """
    # the interpreter runs a program's operations in order
    wait_for_all_loads = (lambda: None) if interpret else plgpu.debug_barrier
    # the outputs, which hold what the aliased inputs before them held
    windows = _Windows(*refs[len(refs) // 2 :])
    head, piece, (_, _, slots, head_dim) = pl.program_id(0), pl.program_id(1), windows.k.shape
    layer, shift = layer_ref[0], shift_ref[head]
    slot = jnp.arange(pl.next_power_of_2(slots))
    channel = piece * channels + jnp.arange(channels)[None, :]
    inside = (slot[:, None] < slots) & (channel < head_dim)

    @pl.when(shift != 0)
    def _():
        for window in (windows.k, windows.v):
            moved = window.at[layer, head, slot[:, None] + shift, channel]
            value = plgpu.load(moved, mask=inside & (slot[:, None] + shift < slots), other=0)
            wait_for_all_loads()
            plgpu.store(window.at[layer, head, slot[:, None], channel], value, mask=inside)

    if windows.significance is None:
        return

    @pl.when((shift != 0) & (piece == 0))
    def _():
        value = plgpu.load(
            windows.significance.at[layer, head, slot + shift], mask=slot + shift < slots, other=0
        )
        wait_for_all_loads()
        plgpu.store(windows.significance.at[layer, head, slot], value, mask=slot < slots)
