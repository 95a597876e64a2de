"""The compression event of many heads as one Pallas kernel for TPU, between a few operations."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dispatch import tpu_interpreter
from ..pages import PageLayout, Pages, meta_as_bits, meta_like, tier_page_ids
from ..plan_event.mosaic_tpu import Blocks
from ..plan_event.reference import Moves, Rule
from .mosaic_tpu_kernel import Inputs, Outputs, carry_out
from .mosaic_tpu_pages import Plan, Pool, Scratch
from .plan import leaving_of, of_admitted, sizes_after
from .reference import Stored, Tokens
from .ring import allocate, release

LANES_OF_TOKENS = 16  # rows of a tile of 16-bit tokens


def apply_event(
    stored: Stored,
    layout: PageLayout,
    rule: Rule,
    moves: Moves,
    tokens: Tokens,
    entering: Array,
    admitted: Array,
    *,
    one_victim: bool,
    max_len: int,
    interpret: bool | Literal["checked"],
    blocks: Blocks | None = None,
) -> Stored:
    """`apply_event` of api.py on TPU: pool and table stay in HBM, changed in place if donated."""
    del max_len  # lengths are read
    entering, moves = of_admitted(entering, moves, admitted)
    sizes = sizes_after(layout, stored.tier_len, entering, moves)
    arriving, length = (jnp.stack(x, axis=-1) for x in (sizes.arriving, sizes.tier_len))
    leaving, extra = leaving_of(moves), jnp.maximum(sizes.more, 0)
    granted, ring = allocate(stored.ring, extra, _most_extra(layout, entering.shape[1]))
    numbers = dict(
        busy=(arriving.any(axis=-1) | leaving.any(axis=-1))[:, None],
        length=stored.tier_len,
        dropped=moves.dropped,
        demoted=moves.demoted[:, None],
        victim=moves.victim,
        extra=extra[:, None],
        granted=granted,
        tail=_tails(layout, stored, leaving, length),
        query_spans=rule.query_spans.reshape(len(extra), -1),
    )
    surplus, table, pages = _call(
        stored, layout, rule.tau, numbers, tokens, entering, one_victim, blocks, interpret
    )
    nth = jnp.arange(surplus.shape[-1])
    ring = release(ring, surplus, nth < jnp.maximum(-sizes.more, 0)[:, None])
    return Stored(pages, ring, table, length)


def _pages(layout: PageLayout, tier_len: Array) -> Array:
    """Pages of each tier `[B, tiers]`."""
    pages = [layout.pages_for(tier, tier_len[:, tier]) for tier in range(layout.tiers)]
    return jnp.stack(pages, axis=-1)


def _tails(layout: PageLayout, stored: Stored, leaving: Array, length: Array) -> Array:
    """Ids `[B, tiers]` of last pages that lose tokens, or gain some and have room; else -1."""
    ids, before = [], stored.tier_len
    for tier in range(layout.tiers):
        last = layout.pages_for(tier, before[:, tier]) - 1
        page_id = tier_page_ids(stored.page_table, tier, jnp.maximum(last, 0), 1)[:, 0]
        room = before[:, tier] % layout.tokens_per_page(tier) > 0
        wanted = (leaving[:, tier] > 0) | (room & (length[:, tier] > before[:, tier]))
        ids.append(jnp.where(wanted, page_id, -1))
    return jnp.stack(ids, axis=-1)


def _most_extra(layout: PageLayout, entering: int) -> int:
    """Most pages by which a head can grow: entering tokens start one page a tier beyond those that
    they fill, demoted ones another.
    """
    return layout.pages_for(0, entering) + 2


def _live_table(stored: Stored, layout: PageLayout) -> Array:
    """The page table with `num_pages` in every column that no tier uses."""
    pages = _pages(layout, stored.tier_len)
    column, width = jnp.arange(stored.page_table.shape[1]), stored.page_table.shape[1]
    used = column < pages[:, :1]
    if layout.tiers == 2:
        used |= column >= width - pages[:, 1:]
    return jnp.where(used, stored.page_table, stored.pages.num_pages)


def _tile(entering: int, tokens: int, lanes: int) -> int:
    """Entering tokens that one program takes, of `tokens` that there are."""
    return min(-(-entering // LANES_OF_TOKENS) * LANES_OF_TOKENS, tokens, lanes)


def _call(
    stored: Stored,
    layout: PageLayout,
    tau: Array,
    numbers: dict[str, Array],
    tokens: Tokens,
    entering: Array,
    one_victim: bool,
    blocks: Blocks | None,
    interpret,
) -> tuple[Array, Array, Pages]:
    """Run the kernel: surplus page ids `[B, max_pages]`, the table and the pool."""
    pages, (heads, n), max_pages = stored.pages, entering.shape, stored.page_table.shape[1]
    tile = _tile(n, tokens.k.shape[1], layout.tokens)
    tiles = -(-n // tile)
    columns, end = {}, 0
    for name, x in numbers.items():
        columns[name], end = range(end, end + x.shape[1]), end + x.shape[1]
    scan = Blocks() if blocks is None else blocks
    plan = Plan(layout, pages.num_pages, max_pages, one_victim, columns, scan)
    inputs = _inputs(stored, layout, tau, numbers, tokens, entering, tiles * tile)
    pool = inputs.pool
    out_shape = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), Outputs(inputs.table, inputs.table, pool)
    )
    changed = len(jax.tree.leaves((inputs.table, pool)))
    first = len(jax.tree.leaves(inputs)) - changed
    surplus, table, pool = pl.pallas_call(
        partial(carry_out, plan=plan),
        out_shape=out_shape,
        grid=(heads, tiles),
        in_specs=_specs(inputs, tile),
        out_specs=jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.HBM), out_shape),
        scratch_shapes=[Scratch.shapes(plan)],
        input_output_aliases={first + i: 1 + i for i in range(changed)},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        cost_estimate=_cost(layout, heads, n),
        interpret=tpu_interpreter(interpret),
        name="apply_event",
    )(*inputs)
    meta = pages.meta if pool.meta is None else meta_like(pool.meta, pages.meta)
    significance = pages.significance if pool.significance is None else pool.significance
    return surplus[:, 0], table[:, 0], Pages(pool.payload, meta, significance, pool.position)


def _inputs(
    stored: Stored,
    layout: PageLayout,
    tau: Array,
    numbers: dict[str, Array],
    tokens: Tokens,
    entering: Array,
    room: int,
) -> Inputs:
    """The kernel's operands; of entering tokens there are `room` lanes of numbers."""
    pages, n = stored.pages, entering.shape[1]
    significance = lax.bitcast_convert_type(tokens.significance[:, :n], jnp.int32)
    token_data = jnp.stack([entering, significance, tokens.position[:, :n]], axis=1)
    pool = Pool(
        pages.payload,
        pages.position,
        meta_as_bits(pages.meta) if layout.meta_rows else None,
        pages.significance if layout.scored else None,
    )
    scalars = jnp.concatenate([x.astype(jnp.int32) for x in numbers.values()], axis=1)[:, None]
    return Inputs(
        numbers=scalars,
        upcoming=scalars,
        tau=tau[:, None],
        k=_plain(tokens.k),
        v=_plain(tokens.v),
        token_data=jnp.pad(token_data, ((0, 0), (0, 0), (0, room - n))),
        table=_live_table(stored, layout)[:, None],
        pool=pool,
    )


def _plain(x: Array) -> Array:
    """Tokens in a type that the chip has."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def _specs(inputs: Inputs, tile: int) -> list:
    """Blocks of the kernel's operands."""
    head_dim = inputs.k.shape[2]

    def scalars(x: Array, ahead: int = 0) -> pl.BlockSpec:
        last = x.shape[0] - 1
        return pl.BlockSpec(
            (None, 1, x.shape[2]),
            lambda head, _: (jnp.minimum(head + ahead, last), 0, 0),
            memory_space=pltpu.SMEM,
        )

    rows = pl.BlockSpec((None, tile, head_dim), lambda head, i: (head, i, 0))
    token_data = pl.BlockSpec((None, 3, tile), lambda head, i: (head, 0, i))
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    numbers = [scalars(inputs.numbers), scalars(inputs.upcoming, ahead=1), scalars(inputs.tau)]
    return [*numbers, rows, rows, token_data, hbm, jax.tree.map(lambda _: hbm, inputs.pool)]


def _cost(layout: PageLayout, heads: int, entering: int) -> pl.CostEstimate:
    """Of heads that read and write the tail page of each tier and one page with holes."""
    tokens = heads * layout.tokens
    flops = 2 * tokens * layout.tokens * (layout.rows + 4 * layout.head_dim)
    page_bytes = 2 * heads * (layout.tiers + 1) * layout.page_bytes
    return pl.CostEstimate(
        flops=flops,
        transcendentals=0,
        bytes_accessed=page_bytes + 4 * heads * entering * layout.head_dim,
    )
