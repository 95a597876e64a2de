"""Quantisation of blocks and demotion from one format to another: the public functions."""

from jax import Array

from ..kernels import XLA, Kernels
from .formats import Block, KVFormat


def encode(fmt: KVFormat, k: Array, v: Array, *, kernels: Kernels = XLA) -> Block:
    """Encode blocks of T exact tokens, one pass over the data (DiffKV, arXiv 2412.03131 sec. 5.1).

    Args:
        fmt: codecs of K and V.
        k, v: float32, bfloat16 or float16 `[N, head_dim, T]`.
        kernels: which implementation runs.

    Returns:
        Payloads uint8 `[N, rows, T]` and metadata float16 `[N, meta_rows, T]` of K and V.
    """
    if kernels.implementation == "triton":
        from . import triton

        return triton.encode(fmt, k, v, interpret=kernels.interpret)
    if kernels.implementation == "mosaic_tpu":
        from . import mosaic_tpu

        return mosaic_tpu.encode(fmt, k, v, interpret=kernels.interpret)
    return fmt.encode(k, v)


def demote(source: KVFormat, target: KVFormat, block: Block, *, kernels: Kernels = XLA) -> Block:
    """Requantise blocks `[N, rows, T]` of one format to another without going through memory: on the integer codes where the groups of
    both match, else through float32 (docs/design.md 1).
    """
    if kernels.implementation == "triton":
        from . import triton

        return triton.demote(source, target, block, interpret=kernels.interpret)
    if kernels.implementation == "mosaic_tpu":
        from . import mosaic_tpu

        return mosaic_tpu.demote(source, target, block, interpret=kernels.interpret)
    return source.demote(target, block)
