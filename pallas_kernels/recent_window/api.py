"""New tokens into the recent window, old ones out of it: the public functions."""

from collections.abc import Callable
from typing import Any

from jax import Array

from ..dispatch import XLA, Kernels, Operation
from ..precision import in_32_bits
from . import reference


def _kernels_append(implementation: str) -> Callable[..., Any]:
    if implementation == "triton":
        from .triton import append_recent as run
    elif implementation == "mosaic_tpu":
        from .mosaic_tpu import append_recent as run
    else:
        from .cpu import append_recent as run
    return run


def _kernels_shift(implementation: str) -> Callable[..., Any]:
    if implementation == "triton":
        from .triton import shift_recent as run
    elif implementation == "mosaic_tpu":
        from .mosaic_tpu import shift_recent as run
    else:
        from .cpu import shift_recent as run
    return run


APPEND_RECENT = Operation(reference.append_recent, _kernels_append)
SHIFT_RECENT = Operation(reference.shift_recent, _kernels_shift)


@in_32_bits
def append_recent(
    recent_k: Array,
    recent_v: Array,
    layer: Array,
    k: Array,
    v: Array,
    slot: Array,
    *,
    kernels: Kernels = XLA,
) -> tuple[Array, Array]:
    """Write one new token of each of B heads into the recent window of a layer, in place when the
    caller's arrays are donated.

    Args:
        recent_k, recent_v: the windows of all layers `[L, B, N, d]`.
        layer: int32 [], which layer.
        k, v: `[B, d]`, cast to the windows' dtype.
        slot: int32 `[B]`, where; nothing is written for a head whose slot is not in `[0, N)`.
        kernels: which implementation runs.
    """
    return APPEND_RECENT.on(kernels)(recent_k, recent_v, layer, k, v, slot)


@in_32_bits
def shift_recent(
    recent_k: Array,
    recent_v: Array,
    significance: Array,
    layer: Array,
    shift: Array,
    *,
    kernels: Kernels = XLA,
) -> tuple[Array, Array, Array]:
    """Remove the oldest tokens of each of B heads from the recent window of a layer, in place; the
    others move up, zeros follow.

    Args:
        recent_k, recent_v: the windows of all layers `[L, B, N, d]`.
        significance: float32 `[L, B, N]`, or `[L, B, 0]` when the policy does not score.
        layer: int32 [], which layer.
        shift: int32 `[B]`, 0 to N: how many leave; windows with 0 keep their bits.
        kernels: which implementation runs.
    """
    return SHIFT_RECENT.on(kernels)(recent_k, recent_v, significance, layer, shift)
