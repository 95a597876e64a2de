"""Quantisation of blocks and demotion from one format to another: the public functions."""

from collections.abc import Callable
from typing import Any

from jax import Array

from ..dispatch import XLA, Kernels, Operation
from ..precision import in_32_bits
from .formats import Block, KVFormat


def _kernels_encode(implementation: str) -> Callable[..., Any]:
    if implementation == "triton":
        from .triton import encode as run
    elif implementation == "mosaic_tpu":
        from .mosaic_tpu import encode as run
    else:
        from .cpu import encode as run
    return run


def _kernels_demote(implementation: str) -> Callable[..., Any]:
    if implementation == "triton":
        from .triton import demote as run
    elif implementation == "mosaic_tpu":
        from .mosaic_tpu import demote as run
    else:
        from .cpu import demote as run
    return run


ENCODE = Operation(KVFormat.encode, _kernels_encode)
DEMOTE = Operation(KVFormat.demote, _kernels_demote)


@in_32_bits
def encode(fmt: KVFormat, k: Array, v: Array, *, kernels: Kernels = XLA) -> Block:
    """Encode blocks of T exact tokens, one pass over the data (DiffKV, arXiv 2412.03131 sec. 5.1).

    Args:
        fmt: codecs of K and V.
        k, v: float32, bfloat16 or float16 `[N, head_dim, T]`.
        kernels: which implementation runs.

    Returns:
        Payloads uint8 `[N, rows, T]` and metadata float16 `[N, meta_rows, T]` of K and V.
    """
    return ENCODE.on(kernels)(fmt, k, v)


@in_32_bits
def demote(source: KVFormat, target: KVFormat, block: Block, *, kernels: Kernels = XLA) -> Block:
    """Requantise blocks `[N, rows, T]` of one format to another without going through memory: on
    the integer codes where the groups of both match, else through float32 (docs/design.md 1).
    """
    return DEMOTE.on(kernels)(source, target, block)
