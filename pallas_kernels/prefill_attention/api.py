"""Attention of a prompt chunk and the significance it gives: the public functions."""

from collections.abc import Callable
from typing import Any

from jax import Array

from ..decode_attention.reference import Heads
from ..dispatch import XLA, Kernels, Operation
from ..pages import PageLayout, Pages
from ..precision import in_32_bits
from ..support import writes
from . import reference, sums_reference
from .reference import Chunk, Scale
from .sums_reference import ColumnSums


def _kernels(implementation: str) -> Callable[..., Any]:
    if implementation == "triton":
        from .triton import prefill_attention as run
    elif implementation == "mosaic_tpu":
        from .mosaic_tpu import prefill_attention as run
    else:
        from .cpu import prefill_attention as run
    return run


def _kernels_sums(implementation: str) -> Callable[..., Any]:
    if implementation == "triton":
        from .triton_sums import column_sums as run
    elif implementation == "mosaic_tpu":
        from .mosaic_tpu_sums import column_sums as run
    else:
        from .cpu_sums import column_sums as run
    return run


PREFILL_ATTENTION = Operation(reference.prefill_attention, _kernels, supports=writes)
COLUMN_SUMS = Operation(sums_reference.column_sums, _kernels_sums, supports=writes)


@in_32_bits
def prefill_attention(
    chunk: Chunk,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    scale: Scale,
    *,
    kernels: Kernels = XLA,
) -> tuple[Array, Array]:
    """Attention of a chunk's rows over the pages, the recent window and, causally, the chunk.

    Args:
        chunk: C right-aligned tokens of each of B heads, G query heads each; the kernels multiply
            in its type and add in float32.
        pages: the pool, read through `heads.page_table`.
        layout: static geometry of the pages.
        heads: what the heads held before the chunk; what lies beyond the lengths is never used.
        scale: factor and soft cap of the logits.
        kernels: which implementation runs.

    Returns:
        Output float32 `[B, G, C, d]` and log-sum-exp of the logits float32 `[B, G, C]`. Padded rows
        (the first `C - length`) hold anything finite. No array of the size of rows times keys
        exists.
    """
    return PREFILL_ATTENTION.on(kernels, layout)(chunk, pages, layout, heads, scale)


@in_32_bits
def column_sums(
    chunk: Chunk,
    lse: Array,
    observe: int,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    scale: Scale,
    *,
    kernels: Kernels = XLA,
) -> ColumnSums:
    """Score every key by the last `observe` rows of the chunk: probabilities summed over those
    rows, then one score of the group.

    That is the maximum over the query heads (DiffKV, arXiv 2412.03131 sec. 4) or their mean:
    `layout.group`. Arguments as in `prefill_attention`; `observe` is static, at most C, padded rows
    do not count; `lse [B, G, C]` is the log-sum-exp that `prefill_attention` returned.

    Returns:
        `ColumnSums`: the pool's significance with the sums of stored tokens added, and the sums of
        recent and of chunk tokens (zeros where there is no token). No array of the size of rows
        times keys exists.
    """
    return COLUMN_SUMS.on(kernels, layout)(chunk, lse, observe, pages, layout, heads, scale)
