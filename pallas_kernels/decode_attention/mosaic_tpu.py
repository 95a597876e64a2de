"""Decode attention of one query token a request, as one Pallas kernel for TPU."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dispatch import tpu_interpreter
from ..pages import PageLayout, Pages, meta_as_bits
from .mosaic_tpu_block import LANES
from .mosaic_tpu_kernel import attend_head
from .mosaic_tpu_stream import Plan
from .reference import Heads, Sliding

SCORE_BYTES = 8 << 20  # of VMEM for kept logits and significance: half of what v4 to v5p give
TABLE_BYTES = 768 << 10  # SMEM (1 MiB) that the page table and the lengths may take
# read in part: XLA is told to leave them in HBM, else it may copy them whole to VMEM
LARGE = ("recent_k", "recent_v", "payload", "meta", "position", "old_significance")


@dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
        tokens: that one step of the loop over a tier reads; rounded down to whole pages, at least
            one page.
        buffers: steps whose pages are in VMEM at a time: one being read, the others on their way.
        splits: equal shares of the heads that the cores of one chip may take (v4 and v5p have two);
            more than one does not hurt on others.
    """

    tokens: int
    buffers: int
    splits: int

    @staticmethod
    def choose(layout: PageLayout, batch: int) -> "Blocks":
        """8 blocks a step, 1024 tokens where T is 128; and 1 MiB on its way: what 0.8 to 2.8 TB/s
        deliver during a copy's latency.
        """
        tokens = max(8 * layout.tokens, max(map(layout.tokens_per_page, range(layout.tiers))))
        pages = tokens // layout.tokens_per_page(0)
        step_bytes = pages * layout.tokens * (layout.rows + 2 * layout.meta_rows)
        buffers = min(8, max(2, 1 + -(-(1 << 20) // step_bytes)))
        return Blocks(tokens, buffers, splits=2 if batch % 2 == 0 else 1)


def decode_attention(
    q: Array,
    pages: Pages,
    layout: PageLayout,
    heads: Heads,
    *,
    max_len: int,
    sm_scale: float,
    logits_soft_cap: float | None,
    sliding: Sliding | None,
    interpret: bool | Literal["checked"],
    blocks: Blocks | None = None,
) -> tuple[Array, Array, Array]:
    """`decode_attention` of api.py on TPU. The pool stays in HBM; `significance` is changed in
    place where the caller donates it.

    Raises:
        ValueError: `max_len` tokens' logits or the page table are more than the chip's near memory
            is given for.
    """
    (batch, group, _), window = q.shape, None if sliding is None else sliding.size
    blocks = Blocks.choose(layout, batch) if blocks is None else blocks
    plan = Plan(
        layout=layout,
        pages=tuple(
            max(1, blocks.tokens // layout.tokens_per_page(t)) for t in range(layout.tiers)
        ),
        buffers=blocks.buffers,
        heads=batch // blocks.splits,
        max_pages=heads.page_table.shape[1],
        sm_scale=sm_scale,
        soft_cap=logits_soft_cap,
        window=window,
    )
    _check_memory(plan, batch, group, max_len, blocks)
    scalars = [heads.page_table, heads.tier_len, heads.recent_len, heads.layer.reshape(1)]
    scalars += [] if sliding is None else [sliding.position]
    arrays = _arrays(q, pages, layout, heads)
    if not interpret:
        arrays |= {
            name: pltpu.with_memory_space_constraint(arrays[name], pltpu.HBM) for name in LARGE
        }
    tables = arrays["tables"]
    names, call = _build(plan, q, pages, heads, tables, max_len, blocks, interpret, len(scalars))
    output, recent, *significance = call(*scalars, *(arrays[name] for name in names))
    return output, significance[0] if layout.scored else pages.significance, recent[:, 0]


def _arrays(q: Array, pages: Pages, layout: PageLayout, heads: Heads) -> dict:
    """The operands by the names in `Refs`, also those that some layouts do not have."""
    arrays: dict = dict(q=q, recent_k=heads.recent_k, recent_v=heads.recent_v)
    arrays |= dict(payload=pages.payload, meta=meta_as_bits(pages.meta), position=pages.position)
    arrays |= dict(old_significance=pages.significance, tables=_tables(layout, heads))
    if layout.rope is not None:
        arrays["frequencies"] = jnp.asarray(layout.rope, jnp.float32)[:, None]
    return arrays


def _check_memory(plan: Plan, batch: int, group: int, max_len: int, blocks: Blocks) -> None:
    if batch % blocks.splits:
        raise ValueError(f"{blocks.splits=} must divide the {batch} heads")
    scratch = _score_scratch(plan, group, max_len).values()
    score_bytes = sum(_padded_bytes(x.shape, x.dtype) for x in scratch)
    if score_bytes > SCORE_BYTES:
        raise ValueError(
            f"{max_len=} with {group} query heads a group needs {score_bytes} bytes of VMEM for "
            f"the logits, and at most {SCORE_BYTES} are given; use implementation='xla' or a "
            "policy that does not score"
        )
    columns = (plan.max_pages, plan.layout.tiers)
    table_bytes = sum(_padded_bytes((batch, n), jnp.int32) for n in columns)
    if table_bytes > TABLE_BYTES:
        raise ValueError(
            f"the page table of {batch} heads with {plan.max_pages} pages takes {table_bytes} "
            f"bytes of SMEM, and at most {TABLE_BYTES} are given; use fewer requests, a smaller "
            "max_len or implementation='xla'"
        )


def _padded_bytes(shape: tuple[int, ...], dtype) -> int:
    """Bytes of an array whose last two axes are padded to tiles of 8 x 128 words."""
    *outer, rows, lanes = shape
    count = (rows + -rows % 8) * (lanes + -lanes % 128) * jnp.dtype(dtype).itemsize
    for n in outer:
        count *= n
    return count


def _score_scratch(plan: Plan, group: int, max_len: int) -> dict:
    """VMEM in which a head's logits and significance pages wait for the end of its softmax; empty
    when the layout is not scored.
    """
    layout = plan.layout
    if not layout.scored:
        return {}
    of_chunks = sum(n * b for n, b in zip(plan.pages, layout.blocks, strict=True))
    logit_blocks = -(-max_len // layout.tokens) + of_chunks
    kept_pages = plan.max_pages + max(plan.pages)
    return dict(
        logits=pltpu.VMEM((logit_blocks, group, layout.tokens), jnp.float32),
        scores=pltpu.VMEM((2, kept_pages, layout.token_data_rows, layout.tokens), jnp.float32),
    )


def _tables(layout: PageLayout, heads: Heads) -> dict[tuple[int, int], Array]:
    """Learned tables by tier and tensor `[L, KV heads, d or 1, levels]`; float16 as int16 bits."""
    found = {}
    for tier, tables in enumerate(heads.tables):
        for tensor, table in enumerate(tables):
            if table is None:
                continue
            if table.dtype != jnp.bfloat16:
                table = lax.bitcast_convert_type(table, jnp.int16)
            if table.ndim == 5:  # codebooks [L, KV heads, d / channels, levels, channels]
                shape = (*table.shape[:2], layout.head_dim, table.shape[3])
                found[tier, tensor] = jnp.swapaxes(table, -1, -2).reshape(shape)
            else:
                found[tier, tensor] = table[:, :, None]
    return found


def _of_head(plan: Plan, *shape: int) -> pl.BlockSpec:
    """All `shape` of the program's head of an array `[B, *shape]`."""
    return pl.BlockSpec(
        (None, *shape), lambda core, step, *_: (core * plan.heads + step, *(0 for _ in shape))
    )


def _of_table(plan: Plan, table: Array) -> pl.BlockSpec:
    """The table of a head's layer and KV head."""
    kv_heads, block = table.shape[1], (None, None, *table.shape[2:])
    return pl.BlockSpec(
        block, lambda core, step, *s: (s[3][0], lax.rem(core * plan.heads + step, kv_heads), 0, 0)
    )


def _whole_registers(rows: int, levels: int) -> tuple[int, int]:
    return rows, levels + -levels % LANES


def _build(
    plan: Plan,
    q: Array,
    pages: Pages,
    heads: Heads,
    tables: dict,
    max_len: int,
    blocks: Blocks,
    interpret,
    num_scalars: int,
):
    """The names of the kernel's array operands and the call `(*scalars, *operands) -> (output,
    recent scores[, significance])`.
    """
    (batch, group, head_dim), slots = q.shape, heads.recent_k.shape[2]
    inputs = _inputs(plan, q, slots, tables)
    scratch = _scratch(plan, group, max_len, pages.position.dtype, tables)
    outputs = dict(output=_of_head(plan, group, head_dim), recent_scores=_of_head(plan, 1, slots))
    shapes: list = [
        jax.ShapeDtypeStruct((batch, group, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, 1, slots), jnp.float32),
    ]
    aliases = {}
    if plan.layout.scored:
        aliases = {num_scalars + list(inputs).index("old_significance"): len(shapes)}
        outputs["significance"] = inputs["old_significance"]
        shapes.append(pltpu.HBM(pages.significance.shape, jnp.float32))
    scalar_names = ("page_table", "tier_len", "recent_len", "layer", "query_position")[:num_scalars]
    call = pl.pallas_call(
        partial(attend_head, names=(*scalar_names, *inputs, *outputs, *scratch), plan=plan),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=num_scalars,
            grid=(blocks.splits, plan.heads),
            in_specs=list(inputs.values()),
            out_specs=list(outputs.values()),
            scratch_shapes=list(scratch.values()),
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True
        ),
        cost_estimate=_cost(plan, batch, group, max_len),
        interpret=tpu_interpreter(interpret),
        name="decode_attention",
    )
    return tuple(inputs), call


def _inputs(plan: Plan, q: Array, slots: int, tables: dict) -> dict:
    """What a program is given of each array operand, in their order; tables last."""
    layout, (_, group, head_dim) = plan.layout, q.shape
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    recent = pl.BlockSpec(
        (None, None, slots, head_dim),
        lambda core, step, *s: (s[3][0], core * plan.heads + step, 0, 0),
    )
    inputs: dict = dict(q=_of_head(plan, group, head_dim), recent_k=recent, recent_v=recent)
    inputs["payload"] = hbm
    if layout.meta_rows:
        inputs["meta"] = hbm
    if plan.positions:
        inputs["position"] = hbm
    if layout.scored:
        inputs["old_significance"] = hbm
    if layout.rope is not None:
        inputs["frequencies"] = pl.BlockSpec((head_dim // 2, 1), lambda *_: (0, 0))
    if tables:
        inputs["tables"] = {which: _of_table(plan, table) for which, table in tables.items()}
    return inputs


def _scratch(plan: Plan, group: int, max_len: int, position_dtype, tables: dict) -> dict:
    """Memory of a program beside its operands."""
    scratch = _stream_scratch(plan, position_dtype)
    if plan.layout.scored:
        scratch |= _score_scratch(plan, group, max_len) | dict(
            scores_read=pltpu.SemaphoreType.DMA, scores_written=pltpu.SemaphoreType.DMA
        )
    if tables:
        scratch["levels"] = {
            which: pltpu.VMEM(_whole_registers(*table.shape[2:]), jnp.float32)
            for which, table in tables.items()
        }
    return scratch


def _stream_scratch(plan: Plan, position_dtype) -> dict:
    """What chunks of pages are streamed through."""
    layout = plan.layout

    def buffer(rows: int, dtype):
        return pltpu.VMEM((plan.buffers, max(plan.pages), rows, layout.tokens), dtype)

    scratch: dict = dict(
        payload_buffer=buffer(layout.rows, jnp.uint8),
        arrived=pltpu.SemaphoreType.DMA((plan.buffers,)),
        cursor=pltpu.SMEM((3,), jnp.int32),
    )
    if layout.meta_rows:
        scratch["meta_buffer"] = buffer(layout.meta_rows, jnp.int16)
    if plan.positions:
        scratch["position_buffer"] = buffer(layout.token_data_rows, position_dtype)
    return scratch


def _cost(plan: Plan, batch: int, group: int, max_len: int) -> pl.CostEstimate:
    """Of heads that hold `max_len` tokens of the highest tier."""
    layout, tokens = plan.layout, batch * max_len
    pages = batch * plan.layout.pages_for(0, max_len)
    page_bytes = layout.tokens * (
        layout.rows + 2 * layout.meta_rows + (8 if layout.scored else 0) * layout.token_data_rows
    )
    return pl.CostEstimate(
        flops=4 * group * layout.head_dim * tokens,
        transcendentals=(1 + layout.scored) * group * tokens,
        bytes_accessed=pages * page_bytes,
    )
