"""What this operation's TPU kernels share: a head's blocks of the operands, and its stored tokens
from HBM page by page, K and V of them.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..codecs.tiles import Scalar, Tile
from ..pages import PageLayout, Pages, meta_as_bits, page_column
from .reference import Scale

BUFFERS = 2  # steps whose pages are in VMEM: one being read, one on its way
TABLE_BYTES = 768 << 10  # of the 1 MiB of SMEM that the page table may take


def check_table(page_table: Array) -> None:
    """Raises ValueError where the page table is more than a chip's scalar memory."""
    heads, columns = page_table.shape
    size = 4 * (heads + -heads % 8) * (columns + -columns % 128)
    if size > TABLE_BYTES:
        raise ValueError(
            f"the page table of {heads} heads with {columns} pages takes {size} bytes of SMEM, and "
            f"at most {TABLE_BYTES} are given; use fewer requests, a smaller max_len or "
            "implementation='xla'"
        )


def of_head(*shape: int) -> pl.BlockSpec:
    """All `shape` of the program's head of an array `[B, *shape]`."""
    return pl.BlockSpec((None, *shape), lambda head, *_: (head, *(0 for _ in shape)))


def window_of_head(slots: int, head_dim: int) -> pl.BlockSpec:
    """The head's recent window in the layer of the call, the last scalar but one."""
    return pl.BlockSpec(
        (None, None, slots, head_dim), lambda head, *rest: (rest[-2][0], head, 0, 0)
    )


def pool_inputs(pages: Pages, interpret) -> tuple[Array, Array]:
    """Payload and metadata as the kernels take them, kept in HBM however small they are."""
    empty = jnp.zeros((1, 1, pages.meta.shape[2]), jnp.int16)  # an empty array is no Ref
    payload, meta = pages.payload, meta_as_bits(pages.meta) if pages.meta.size else empty
    if interpret:
        return payload, meta
    in_hbm = pltpu.with_memory_space_constraint
    return in_hbm(payload, pltpu.HBM), in_hbm(meta, pltpu.HBM)


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of `n` that is at most `most`."""
    return next(size for size in range(min(n, most), 0, -1) if n % size == 0)


def matmul(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """`a` times `b` over axes `contract` in float32 sums; float32 factors in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def capped(dots: Array, scale: Scale) -> Array:
    """Logits of scaled dot products."""
    cap = scale.soft_cap
    return dots if cap is None else cap * jnp.tanh(dots * (1 / cap))


def row_of(column: Array) -> Array:
    """`[n, 1]` as `[1, n]`, without a transpose of narrow arrays."""
    n = column.shape[0]
    return jnp.where(_diagonal(n), column, 0.0).sum(axis=0, keepdims=True)


def column_of(row: Array) -> Array:
    """`[1, n]` as `[n, 1]`, without a transpose of narrow arrays."""
    n = row.shape[1]
    return jnp.where(_diagonal(n), row, 0.0).sum(axis=1, keepdims=True)


def _diagonal(n: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, (n, n), 0) == lax.broadcasted_iota(jnp.int32, (n, n), 1)


class Buffers(NamedTuple):
    """VMEM that the pages arrive in."""

    payload: Any  # uint8 [BUFFERS, pages of a step, rows, T]
    meta: Any  # int16 [BUFFERS, pages of a step, meta_rows, T]; bits of float16
    arrived: Any  # DMA semaphores [BUFFERS]

    @staticmethod
    def of(layout: PageLayout, pages: int) -> "Buffers":
        """Scratch for at most `pages` pages a step."""
        return Buffers(
            pltpu.VMEM((BUFFERS, pages, layout.rows, layout.tokens), jnp.uint8),
            pltpu.VMEM((BUFFERS, pages, max(layout.meta_rows, 1), layout.tokens), jnp.int16),
            pltpu.SemaphoreType.DMA((BUFFERS,)),
        )


class Group(NamedTuple):
    """Channels with one scale and zero point, `first` to `first + size`, and their tiles."""

    first: int
    size: int
    tiles: tuple[Tile, ...]


Coded = tuple[Group, Array, Array | None, Array | None]  # with codes, scale and zero point


def groups_of(codec: Scalar, head_dim: int) -> list[Group]:
    """The groups of a codec; one for exact types."""
    by_row: dict[int | None, list[Tile]] = {}
    for tile in codec.tiles(head_dim):
        by_row.setdefault(tile.scale_row, []).append(tile)
    return [
        Group(tiles[0].channel, sum(t.channels for t in tiles), tuple(tiles))
        for tiles in by_row.values()
    ]


class Tier(NamedTuple):
    """The stored tokens of one tier of one head, `pages` pages at a time."""

    layout: PageLayout
    number: int
    head: Any
    length: Any  # int32, tokens
    pages: int  # of a step
    page_table: Any  # SMEM int32 [B, max_pages]
    payload: Any  # HBM uint8 [num_pages, rows, T]
    meta: Any  # HBM int16 [num_pages, meta_rows, T]
    buffers: Buffers

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.pages * self.layout.tokens_per_page(self.number)

    def page_id(self, page):
        """Id of page number `page`, or of the last live one where there are fewer."""
        last = self.layout.pages_for(self.number, self.length) - 1
        page, columns = jnp.minimum(page, last), self.page_table.shape[1]
        return self.page_table[self.head, page_column(self.number, page, columns)]

    def copies(self, step, slot, rows: int) -> list:
        """The copies of a step's metadata and first `rows` payload rows of its pages to `slot`."""
        copies = []
        for page in range(self.pages):
            source, arrived = self.page_id(step * self.pages + page), self.buffers.arrived.at[slot]
            to = self.buffers.payload.at[slot, page, pl.ds(0, rows)]
            payload = self.payload.at[source, pl.ds(0, rows)]
            copies.append(pltpu.make_async_copy(payload, to, arrived))
            if self.layout.meta_rows:
                to = self.buffers.meta.at[slot, page]
                copies.append(pltpu.make_async_copy(self.meta.at[source], to, arrived))
        return copies

    def valid(self, step) -> Array:
        """Which tokens of a step exist: bool `[1, step_tokens]`."""
        lane = lax.broadcasted_iota(jnp.int32, (1, self.step_tokens), 1)
        return step * self.step_tokens + lane < self.length

    def keys(self, slot, valid: Array, dtype) -> list[Coded]:
        """Of each group of channels: codes `[channels, n]` of the keys in `slot`, float32 scale and
        zero point `[1, n]` or None.
        """
        return self._read(self.layout.formats[self.number].scalars()[0], slot, valid, dtype, 0, 0)

    def values(self, slot, valid: Array, dtype) -> list[Coded]:
        """The same of the values."""
        codec, start = self.layout.formats[self.number].scalars()[1], self.layout.value_start
        return self._read(codec, slot, valid, dtype, *start(self.number))

    def _read(
        self, codec: Scalar, slot, valid: Array, dtype, first_row: int, first_meta: int
    ) -> list:
        blocks = list(product(range(self.pages), range(self.layout.blocks[self.number])))
        rows, head_dim = codec.rows(self.layout.head_dim), self.layout.head_dim
        meta = []
        if codec.meta_rows:
            bits = [self.buffers.meta[slot, page].astype(jnp.int32) for page in range(self.pages)]
            meta = [
                bits[page][first_meta + block * codec.meta_rows :][: codec.meta_rows]
                for page, block in blocks
            ]

        def number(row: int) -> Array:
            return jnp.where(valid, side_by_side([block[row : row + 1] for block in meta], 1), 0)

        def codes(tile: Tile) -> Array:
            def unpacked(page: int, block: int) -> Array:
                start = first_row + block * rows
                planes = [
                    self.buffers.payload[slot, page, start + row : start + row + tile.channels]
                    for row in tile.rows
                ]
                return tile.unpack([plane.astype(jnp.int32) for plane in planes])

            x = side_by_side([unpacked(*block) for block in blocks], 1)
            if tile.scale_row is None:  # an exact number of a dead lane may be NaN
                x = jnp.where(valid, x, 0.0)
            return x.astype(dtype)

        def read(group: Group) -> Coded:
            joined = side_by_side(list(map(codes, group.tiles)), 0)
            return (group, joined, *group.tiles[0].scale_zero(number))

        return list(map(read, groups_of(codec, head_dim)))


def side_by_side(parts: Sequence[Array], axis: int) -> Array:
    """The parts joined along an axis; one alone as it is."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)


def over_steps(tier: Tier, rows: int, body: Callable) -> None:
    """`body(step, slot)` for every step of a tier, its pages' first `rows` payload rows in `slot`,
    the next step's on their way.
    """
    steps = pl.cdiv(tier.length, tier.step_tokens)

    @pl.when(steps > 0)
    def _():
        for copy in tier.copies(0, 0, rows):
            copy.start()

    def one(step, _):
        slot = lax.rem(step, BUFFERS)

        @pl.when(step + 1 < steps)
        def _():
            for copy in tier.copies(step + 1, 1 - slot, rows):
                copy.start()

        for copy in tier.copies(step, slot, rows):
            copy.wait()
        body(step, slot)
        return None

    lax.fori_loop(0, steps, one, None)


def dots_of(
    q_of: Callable[[Group], tuple[Array, Array]], keys: Sequence[tuple], factor: float
) -> Array:
    """`factor` times the dot products `[M, n]` of queries with keys; `q_of(group)` gives their
    channels `[M, c]` and the sums `[M, 1]`.
    """
    total = None
    for group, codes, scale, zero in keys:
        q, sums = q_of(group)
        dots = matmul(q, codes)
        part = dots * (factor if scale is None else scale * factor)
        if zero is not None:
            part = part + sums * (zero * factor)
        total = part if total is None else total + part
    assert total is not None
    return total
