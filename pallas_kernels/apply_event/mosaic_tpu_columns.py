"""Tokens as columns: one page block in VMEM is an int32 matrix whose lanes are tokens, whatever the
formats; moves are one-hot products.

A column of a tier holds, top to bottom: payload bytes of K and of V, metadata bits of K and of V
(float16), the bits of the significance (float32; absent when the layout is not scored) and the
position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from ..codecs.tiles import Scalar, Tile
from ..pages import PageLayout


@dataclass(frozen=True)
class Columns:
    """First rows of the parts of a column."""

    payload: tuple[int, int]  # of K and of V
    meta: tuple[int, int]
    significance: int
    position: int
    rows: int  # how many

    @staticmethod
    def of(layout: PageLayout, tier: int) -> "Columns":
        """Those of a tier."""
        fmt, d = layout.formats[tier], layout.head_dim
        k, end = fmt.key.rows(d), fmt.key.rows(d) + fmt.value.rows(d)
        v_meta = end + fmt.key.meta_rows
        token_data = v_meta + fmt.value.meta_rows
        position = token_data + layout.scored
        return Columns((0, k), (end, v_meta), token_data, position, rows=position + 1)

    @property
    def meta_end(self) -> int:
        """Where significance (if any) and position begin."""
        return self.significance

    @property
    def bytes_end(self) -> int:
        """Rows before this hold bytes, the others words."""
        return self.meta[0]


def move(words: Array, where_to: Array, size: int, contract: int = 1) -> Array:
    """Lanes of int32 `words [rows, n]` to those of the one-hot `where_to [n, T]`, else 0; exact.

    The words have `size` bytes that are not zero. A byte is exact in bfloat16. With `contract=0`
    the words are `[n, rows]`.
    """
    parts, dims = [], (((contract,), (0,)), ((), ()))
    for byte in range(size):
        part = words if size == 1 else (words >> (8 * byte)) & 255
        part = part.astype(jnp.float32).astype(jnp.bfloat16)
        product = lax.dot_general(part, where_to, dims, preferred_element_type=jnp.float32)
        parts.append(product.astype(jnp.int32) << (8 * byte))
    return sum(parts[1:], start=parts[0])


def move_columns(columns: Columns, ref: Any, where_to: Array) -> tuple[Array, Array]:
    """Columns of a block `ref [rows, T]` to other lanes: their bytes and their words."""
    end = columns.bytes_end
    return move(ref[:end], where_to, 1), move(ref[end:], where_to, 4)


def as_column(row: Array) -> Array:
    """int32 `[1, n]` to `[n, 1]`."""
    i, j = _indices(row.shape[1])
    return jnp.where(i == j, row, 0).sum(axis=1, keepdims=True)


def as_row(column: Array) -> Array:
    """int32 `[n, 1]` to `[1, n]`."""
    i, j = _indices(column.shape[0])
    return jnp.where(i == j, column, 0).sum(axis=0, keepdims=True)


def count_above(row: Array) -> Array:
    """Sum over the higher lanes of int32 `[1, n]`, as a column `[n, 1]`."""
    i, j = _indices(row.shape[1])
    return jnp.where(j > i, row, 0).sum(axis=1, keepdims=True)


def count_below(row: Array) -> Array:
    """Sum over the lower lanes of int32 `[1, n]`, as a column `[n, 1]`."""
    i, j = _indices(row.shape[1])
    return jnp.where(j < i, row, 0).sum(axis=1, keepdims=True)


def _indices(n: int) -> tuple[Array, Array]:
    return lax.broadcasted_iota(jnp.int32, (n, n), 0), lax.broadcasted_iota(jnp.int32, (n, n), 1)


def one_hot(valid: Array, lane: Array, lanes: int) -> Array:
    """Columns `valid`, `lane [n, 1]` to bfloat16 `[n, lanes]`, 1 at the lane of each valid one."""
    j = lax.broadcasted_iota(jnp.int32, (valid.shape[0], lanes), 1)
    return jnp.where(valid & (j == lane), 1.0, 0.0).astype(jnp.bfloat16)


def encode(layout: PageLayout, tier: int, k: Array, v: Array, out: Any) -> None:
    """Float32 `[d, T]` to the payload and metadata of the columns `out [rows, T]` of a tier."""
    columns, fmt = Columns.of(layout, tier), layout.formats[tier]
    for tensor, (codec, x) in enumerate(zip(fmt.scalars(), (k, v), strict=True)):
        tiles = codec.tiles(layout.head_dim)
        values = [x[tile.channel : tile.channel + tile.channels] for tile in tiles]
        codes, meta = codec.encode_tiles(tiles, values)
        _write(columns, tensor, codec, tiles, codes, meta, out)


def requantise(layout: PageLayout, source: Any, out: Any) -> None:
    """Columns `source [rows, T]` of tier 0 to columns `out` of tier 1: on the codes where the
    groups match, else through float32.
    """
    above, below = Columns.of(layout, 0), Columns.of(layout, 1)
    high, low = layout.formats
    for tensor, (old, new) in enumerate(zip(high.scalars(), low.scalars(), strict=True)):
        meta = {row: source[above.meta[tensor] + row] for row in range(old.meta_rows)}
        codes = partial(_codes, above, tensor, source=source)
        lower = old.demote_tiles(new, layout.head_dim, codes, meta.__getitem__)
        _write(below, tensor, new, *lower, out)
    out[below.significance :] = source[above.significance :]


def _codes(columns: Columns, tensor: int, tile: Tile, source: Any) -> Array:
    first = columns.payload[tensor]
    return tile.unpack([source[first + row : first + row + tile.channels] for row in tile.rows])


def _write(
    columns: Columns,
    tensor: int,
    codec: Scalar,
    tiles: Sequence[Tile],
    codes,
    meta: dict[int, Array],
    out: Any,
) -> None:
    for row, packed in codec.pack_tiles(tiles, codes).items():
        first = columns.payload[tensor] + row
        out[first : first + packed.shape[0]] = packed
    for row, x in meta.items():
        out[_row(columns.meta[tensor] + row)] = x[None]


def _row(index: int) -> slice:
    return slice(index, index + 1)
