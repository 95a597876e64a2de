"""Decode attention on the CPU: the native kernel of cpu.cc."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..native import build
from ..pages import PageLayout, Pages
from .reference import Heads, Sliding


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
) -> tuple[Array, Array, Array]:
    """`decode_attention` of api.py. Reads each live page once and adds to the significance in
    place; multiplies in bfloat16 when q is bfloat16 and the CPU has AVX512-BF16, else in float32.

    Raises:
        ValueError or jax.errors.JaxRuntimeError: when run, for a length or page id that leads out
            of an array.
    """
    del max_len
    b, group, d = q.shape
    slots = heads.recent_k.shape[2]
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        q = q.astype(jnp.float32)
    learned = [table for tier in heads.tables for table in tier] + [None] * 4
    tables = [jnp.zeros(0, jnp.float16) if table is None else table for table in learned[:4]]
    run = build.call(
        "decode_attention",
        "decode_attention_cpu",
        jax.ShapeDtypeStruct((b, group, d), jnp.float32),
        jax.ShapeDtypeStruct(pages.significance.shape, jnp.float32),
        jax.ShapeDtypeStruct((b, slots), jnp.float32),
        aliases={3: 1},
    )
    out, significance, recent = run(
        q,
        pages.payload,
        pages.meta,
        pages.significance,
        pages.position,
        heads.page_table,
        heads.tier_len,
        heads.recent_k,
        heads.recent_v,
        heads.recent_len,
        jnp.asarray(heads.layer, jnp.int32),
        jnp.zeros(b, jnp.int32) if sliding is None else sliding.position,
        *tables,
        formats=layout.native_formats(),
        frequencies=np.asarray(layout.rope or (), np.float32),
        sm_scale=np.float32(sm_scale),
        cap=np.float32(logits_soft_cap or 0),
        sliding=np.int64(0 if sliding is None else sliding.size),
        mean=np.bool_(layout.group == "mean"),
    )
    return out, significance, recent
