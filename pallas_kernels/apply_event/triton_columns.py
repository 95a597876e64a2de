"""Columns (single tokens) of pages on GPUs: copied, requantised, encoded, written, as tiles.

Triton cannot slice or join values, so a column is loaded and stored in pieces of rows, `n` columns
side by side.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as plgpu

from ..codecs.scales import as_half
from ..codecs.tiles import Scalar, Tile
from ..pages import PageLayout
from ..plan_event.triton import Slots

ROWS = 64  # of one piece of a copied column


class Pool(NamedTuple):
    """Refs of the pool's arrays; None where the layout has no such rows."""

    payload: Any  # uint8 [num_pages, rows, T]
    meta: Any  # float16 [num_pages, meta_rows, T]
    significance: Any  # float32 [num_pages, blocks, T]
    position: Any  # uint16 or int32 [num_pages, blocks, T]


class Encoded(NamedTuple):
    """Encoded K or V of `n` tokens."""

    payload: dict[int, Array]  # {first row: uint8 [rows, n]}
    meta: dict[int, Array]  # {row: float16 [n]}


class Columns(NamedTuple):
    """Encoded tokens of one tier, `n` side by side."""

    k: Encoded
    v: Encoded
    significance: Array | None  # float32 [n], None when the layout is not scored
    position: Array  # int32 [n]


class _Part(NamedTuple):
    """Rows of K or of V in an array of the pool: those of block b begin at `first + b * rows`."""

    ref: Any
    first: int
    rows: int

    def at(self, slots: Slots, row: Array):
        """Elements at rows `row [rows, 1]` of the part of `slots [n]`: view `[rows, n]`, mask."""
        rows = self.first + slots.block[None, :] * self.rows + row
        valid = jnp.broadcast_to(slots.valid[None, :], rows.shape)
        return self.ref.at[slots.page[None, :], rows, slots.lane[None, :]], valid

    def load(self, slots: Slots, first: int, count: int) -> Array:
        """Rows `[first, first + count)` of tokens `[n]`: `[count, n]`, 0 where not valid."""
        view, valid = self.at(slots, _range(first, count))
        return plgpu.load(view, mask=valid, other=0)

    def store(self, slots: Slots, first: int, values: Array) -> None:
        """Inverse of `load`."""
        view, valid = self.at(slots, _range(first, values.shape[0]))
        plgpu.store(view, values.astype(self.ref.dtype), mask=valid)


def _range(first: int, count: int) -> Array:
    return first + jnp.arange(count, dtype=jnp.int32)[:, None]


def _parts(
    pool: Pool, layout: PageLayout, tier: int
) -> tuple[tuple[_Part, _Part], tuple[_Part, _Part]]:
    """(payload, metadata) of K and of V."""
    fmt, (start, meta_start) = layout.formats[tier], layout.value_start(tier)
    k_rows, v_rows = fmt.rows(layout.head_dim)
    return (
        (_Part(pool.payload, 0, k_rows), _Part(pool.meta, 0, fmt.key.meta_rows)),
        (_Part(pool.payload, start, v_rows), _Part(pool.meta, meta_start, fmt.value.meta_rows)),
    )


def copy(pool: Pool, layout: PageLayout, tier: int, source: Slots, target: Slots) -> None:
    """Tokens at slots `source [n]` to slots `target [n]` of the same tier; no slot is both."""
    for parts in _parts(pool, layout, tier):
        for part in parts:
            for first, count in _pieces(part.rows):
                part.store(target, first, part.load(source, first, count))
    for array in (pool.significance, pool.position):
        if array is not None:
            at = array.at[source.page, source.block, source.lane]
            value = plgpu.load(at, mask=source.valid, other=0)
            plgpu.store(array.at[target.page, target.block, target.lane], value, mask=target.valid)


def write(pool: Pool, layout: PageLayout, tier: int, slots: Slots, columns: Columns) -> None:
    """Put tokens at `slots [n]` of a tier."""
    tensors = zip(_parts(pool, layout, tier), (columns.k, columns.v), strict=True)
    for (payload, meta), encoded in tensors:
        for first, rows in encoded.payload.items():
            payload.store(slots, first, rows)
        for row, values in encoded.meta.items():
            meta.store(slots, row, values[None, :])
    token_data = (pool.significance, columns.significance), (pool.position, columns.position)
    for array, values in token_data:
        if array is not None and values is not None:
            at = array.at[slots.page, slots.block, slots.lane]
            plgpu.store(at, values.astype(array.dtype), mask=slots.valid)


def demoted(
    pool: Pool, layout: PageLayout, tier: int, slots: Slots, significance: Array, position: Array
) -> Columns:
    """Tokens at `slots [n]` of a tier, requantised to the next one (docs/design.md 1: on the codes
    alone where the groups match).
    """
    source, target = layout.formats[tier : tier + 2]
    codecs = zip(source.scalars(), target.scalars(), strict=True)
    pairs = zip(codecs, _parts(pool, layout, tier), strict=True)
    k, v = (_requantised(*codecs, layout.head_dim, *parts, slots) for codecs, parts in pairs)
    return Columns(k, v, significance, position)


def _requantised(
    source: Scalar, target: Scalar, head_dim: int, payload: _Part, meta: _Part, slots: Slots
) -> Encoded:
    planes: dict[tuple[int, int], Array] = {}

    def codes(tile: Tile) -> Array:
        for row in tile.rows:
            if (row, tile.channels) not in planes:
                plane = payload.load(slots, row, tile.channels)
                planes[row, tile.channels] = plane.astype(jnp.int32)
        return tile.unpack([planes[row, tile.channels] for row in tile.rows])

    def number(row: int) -> Array:
        return meta.load(slots, row, 1).reshape(-1)

    return _packed(target, *source.demote_tiles(target, head_dim, codes, number))


def encoded(codec: Scalar, head_dim: int, exact: Any, head, index: Array, valid: Array) -> Encoded:
    """Quantise tokens `index [n]` of a head, `exact` a Ref `[B, tokens, head_dim]` (DiffKV, arXiv
    2412.03131 sec. 5.1).
    """
    tiles, values = codec.tiles(head_dim), []
    for tile in tiles:
        channel = _range(tile.channel, tile.channels)
        at = exact.at[head, jnp.where(valid, index, 0)[:, None], channel.reshape(1, -1)]
        mask = jnp.broadcast_to(valid[:, None], (index.shape[0], tile.channels))
        values.append(plgpu.load(at, mask=mask, other=0).astype(jnp.float32).T)
    return _packed(codec, tiles, *codec.encode_tiles(tiles, values))


def _packed(
    codec: Scalar, tiles: Sequence[Tile], codes: Sequence[Array], meta: dict[int, Array]
) -> Encoded:
    payload = {row: x.astype(jnp.uint8) for row, x in codec.pack_tiles(tiles, codes).items()}
    return Encoded(payload, {row: as_half(x) for row, x in meta.items()})


def _pieces(rows: int) -> Iterator[tuple[int, int]]:
    """(first, count) that cover `rows`, counts powers of two up to `ROWS`."""
    first = 0
    while first < rows:
        count = min(ROWS, 1 << ((rows - first).bit_length() - 1))
        yield first, count
        first += count


@cache
def check_tiles(layout: PageLayout) -> None:
    """Raise ValueError where the layout's tiles or blocks are no powers of two (Triton)."""
    formats = layout.formats
    codecs = [(codec,) for fmt in formats for codec in fmt.scalars()]
    codecs += [
        pair
        for high, low in zip(formats, formats[1:], strict=False)
        for pair in zip(high.scalars(), low.scalars(), strict=True)
    ]
    names = "+".join(fmt.name for fmt in formats)
    for codec, *others in codecs:
        for tile in codec.tiles(layout.head_dim, *others):
            if tile.channels & (tile.channels - 1):
                raise ValueError(
                    f"formats {names} at head_dim={layout.head_dim} make a piece of "
                    f"{tile.channels} channels; Triton needs powers of two: choose other groups or "
                    "bits, or use implementation='xla'"
                )
    if layout.meta_dtype != "float16":
        raise ValueError(
            f"meta_dtype={layout.meta_dtype!r} must be float16 for Triton; use implementation='xla'"
        )
    if layout.tokens & (layout.tokens - 1):
        raise ValueError(
            f"tokens={layout.tokens} must be a power of two for Triton; use implementation='xla'"
        )
