"""Attention of a prompt chunk on the CPU: the native kernel of cpu.cc."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..decode_attention.reference import Heads
from ..native import build
from ..pages import PageLayout, Pages
from .reference import Chunk, Scale


def prefill_attention(
    chunk: Chunk, pages: Pages, layout: PageLayout, heads: Heads, scale: Scale
) -> tuple[Array, Array]:
    """`prefill_attention` of api.py. Unpacks 256 keys at a time; multiplies in bfloat16 when q is
    bfloat16 and the CPU has AVX512-BF16, else in float32.

    Raises:
        ValueError or jax.errors.JaxRuntimeError: when run, for a length or page id that leads out
            of an array.
    """
    q, k, v, length = readable(chunk)
    run = build.call(
        "prefill_attention",
        "prefill_attention_cpu",
        jax.ShapeDtypeStruct(q.shape, jnp.float32),
        jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    )
    out, lse = run(
        q,
        k,
        v,
        length,
        pages.payload,
        pages.meta,
        heads.page_table,
        heads.tier_len,
        heads.recent_k,
        heads.recent_v,
        heads.recent_len,
        jnp.asarray(heads.layer, jnp.int32),
        **attributes(layout, scale),
    )
    return out, lse


def readable(chunk: Chunk) -> Chunk:
    """The chunk in float32 unless all of it is in bfloat16."""
    return chunk if all(x.dtype == jnp.bfloat16 for x in chunk[:3]) else chunk.float32()


def attributes(layout: PageLayout, scale: Scale) -> dict[str, np.ndarray | np.generic]:
    """What both handlers want to know of the pages and the logits."""
    return {
        "formats": layout.native_formats(),
        "sm_scale": np.float32(scale.sm_scale),
        "cap": np.float32(scale.soft_cap or 0),
        "token_data_rows": np.int64(layout.token_data_rows),
    }
