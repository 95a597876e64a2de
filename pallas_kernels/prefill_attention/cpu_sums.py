"""Column sums of a chunk's observing rows on the CPU: the native kernel of cpu.cc."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..decode_attention.reference import Heads
from ..native import build
from ..pages import PageLayout, Pages
from .cpu import attributes, readable
from .reference import Chunk, Scale
from .sums_reference import ColumnSums


def column_sums(
    chunk: Chunk,
    lse: Array,
    observe: int,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    scale: Scale,
) -> ColumnSums:
    """`column_sums` of api.py: adds to the significance in place, multiplies like the attention.

    Raises:
        ValueError or jax.errors.JaxRuntimeError: when run, for a length or page id that leads out
            of an array.
    """
    q, k, _, length = readable(chunk)
    run = build.call(
        "prefill_attention",
        "column_sums_cpu",
        jax.ShapeDtypeStruct(pages.significance.shape, jnp.float32),
        jax.ShapeDtypeStruct((k.shape[0], heads.recent_k.shape[2]), jnp.float32),
        jax.ShapeDtypeStruct(k.shape[:2], jnp.float32),
        aliases={11: 0},
    )
    sums = run(
        q,
        k,
        length,
        pages.payload,
        pages.meta,
        heads.page_table,
        heads.tier_len,
        heads.recent_k,
        heads.recent_len,
        jnp.asarray(heads.layer, jnp.int32),
        lse,
        pages.significance,
        observe=np.int64(observe),
        mean=np.bool_(layout.group == "mean"),
        **attributes(layout, scale),
    )
    return ColumnSums(*sums)
