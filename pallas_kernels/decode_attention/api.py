"""Decode attention over paged, mixed-precision tiers: the public function."""

from collections.abc import Callable
from typing import Any

from jax import Array

from ..dispatch import XLA, Kernels, Operation
from ..pages import PageLayout, Pages
from ..precision import in_32_bits
from ..support import reads
from . import reference
from .reference import Heads, Sliding


def _kernels(implementation: str) -> Callable[..., Any]:
    if implementation == "triton":
        from .triton import decode_attention as run
    elif implementation == "mosaic_tpu":
        from .mosaic_tpu import decode_attention as run
    else:
        from .cpu import decode_attention as run
    return run


DECODE_ATTENTION = Operation(reference.decode_attention, _kernels, supports=reads)


@in_32_bits
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
    kernels: Kernels = XLA,
) -> tuple[Array, Array, Array]:
    """Softmax attention of `q [B, G, d]` over every token its KV head holds; the pages are read and
    unpacked once for all G query heads.

    DiffKV, arXiv 2412.03131 sec. 4 (significance) and 6 (attention over two precisions).

    Args:
        q: float32 or bfloat16; the kernels multiply in this type and add in float32, the reference
            does all in float32.
        pages: the pool; only `significance` changes.
        layout: static geometry of the pages; for plain XLA, learned codecs hold the tables of the
            layer's heads.
        heads: page tables, lengths, recent windows, and the learned tables that kernels read; what
            lies beyond the lengths is never used.
        max_len: bounds the tokens of a head.
        sm_scale: factor of the dot products.
        logits_soft_cap: `cap * tanh(logit / cap)` when given.
        sliding: only keys within a window of positions, when given.
        kernels: which implementation runs.

    Returns:
        The output float32 `[B, G, d]`, zeros where a head holds nothing; the pool's significance
        float32 `[num_pages, blocks, T]` with this step's probabilities added (normalised over all
        tokens, then maximum or mean over the G query heads: `layout.group`); the recent tokens'
        probabilities float32 `[B, window + flush]` likewise (zeros when the layout is not scored).
    """
    return DECODE_ATTENTION.on(kernels, layout)(
        q,
        pages,
        layout,
        heads,
        max_len=max_len,
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        sliding=sliding,
    )
