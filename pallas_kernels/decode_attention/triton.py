"""Decode attention as two Triton kernels: one attends, split over a head's tokens, one scores."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..pages import PageLayout, Pages
from .reference import Heads, Sliding
from .stream import Scale
from .triton_attend import Blocks, Inputs, Partials, Task, attend_kernel, float32
from .triton_keys import check_pool, key_pieces, value_pieces
from .triton_score import score_kernel


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
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> tuple[Array, Array, Array]:
    """`decode_attention` of api.py: two launches and a few XLA operations on the partial results;
    the significance is changed in place.

    Besides what must move, the logits of a scored layout go to device memory and back once (4 bytes
    a token and query head for bfloat16 queries, 8 for float32), and the partial results, 8 + 4 * d
    bytes a split and query head.
    """
    (b, g, _), slots = q.shape, heads.recent_k.shape[2]
    blocks = blocks or Blocks.choose(layout, g, max_len, q.dtype.itemsize)
    for refuse in (key_pieces, value_pieces):  # what Triton cannot do, before it is called
        refuse(layout)
    check_pool(pages)
    window = None if sliding is None else sliding.size
    task = Task(layout, Scale(sm_scale, logits_soft_cap), window, blocks)
    inputs = Inputs.of(q, pages, layout, heads, sliding)
    params = plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
    call = partial(
        pl.pallas_call, grid=(b, blocks.splits), compiler_params=params, interpret=bool(interpret)
    )
    left = call(
        partial(attend_kernel, task=task),
        out_shape=Partials.shapes(layout, blocks, q.shape, slots),
        name="decode_attend",
    )(*inputs)
    out, lse = _merged(left)
    if not layout.scored:
        return out, pages.significance, jnp.zeros((b, slots), jnp.float32)
    recent, significance = call(
        partial(score_kernel, task=task),
        out_shape=(float32(b, slots), float32(*pages.significance.shape)),
        input_output_aliases={8: 1},
        name="decode_score",
    )(
        *(inputs.page_table, inputs.tier_len, inputs.recent_len, lse),
        *(left.logits, left.base, left.recent_logits, inputs.payload, pages.significance),
    )
    return out, significance, recent


def _merged(left: Partials) -> tuple[Array, Array]:
    """Join the splits: output float32 `[B, G, d]`, base-2 log-sum-exp `[B, G]`, +inf if no keys."""
    maximum = left.maximum.max(axis=1)
    safe = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    weight = jnp.exp2(left.maximum - safe[:, None])
    total = (left.total * weight).sum(axis=1)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    output = (left.output * weight[..., None]).sum(axis=1) / total[..., None]
    return output, jnp.where(some, safe + jnp.log2(total), jnp.inf)
