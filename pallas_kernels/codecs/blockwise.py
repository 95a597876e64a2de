"""One block of K or V in a kernel, Triton or TPU, tile by tile: encoding and demotion."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from .formats import KVFormat
from .full import Full
from .tiles import Scalar, Tile

Planes = dict[int, Array]  # {first payload row: bytes int32 [channels, T]}
Meta = dict[int, Array]  # {metadata row: bits int32 [T]}


def head_dim_of(codec: Any, rows: int) -> int:
    """The head_dim of a payload of `rows` rows."""
    if isinstance(codec, Full):
        return rows // jnp.dtype(codec.dtype).itemsize
    return rows * 8 // codec.bits


class Parts(NamedTuple):
    """Refs or Arrays of a `Block`; None for the metadata of codecs that have none."""

    k_payload: Any
    v_payload: Any
    k_meta: Any
    v_meta: Any


def parts_of(fmt: KVFormat, parts: Sequence) -> Parts:
    """Those given, in the order of `Parts`, without metadata that the codecs of `fmt` lack."""
    k_payload, v_payload, *metas = parts
    k_meta = metas.pop(0) if fmt.key.meta_rows else None
    return Parts(k_payload, v_payload, k_meta, metas.pop(0) if fmt.value.meta_rows else None)


def encode_block(
    codec: Scalar, head_dim: int, values: Callable[[Tile], Array]
) -> tuple[Planes, Meta]:
    """`Codec.encode` of a block of which `values(tile)` reads a tile as float32 `[channels, T]`."""
    tiles = codec.tiles(head_dim)
    codes, meta = codec.encode_tiles(tiles, [values(tile) for tile in tiles])
    return codec.pack_tiles(tiles, codes), meta


def demote_block(
    source: Scalar,
    target: Scalar,
    head_dim: int,
    planes: Callable[[int, int], Array],
    meta: Callable[[int], Array],
) -> tuple[Planes, Meta]:
    """Requantise a block of `source` to `target`: on the integer codes where the groups match, else
    through float32.

    `planes(row, channels)` reads payload rows as int32 `[channels, T]`, `meta(row)` one metadata
    row `[T]` as it is stored.
    """

    def codes(tile: Tile) -> Array:
        return tile.unpack([planes(row, tile.channels) for row in tile.rows])

    rows = {row: meta(row) for row in range(source.meta_rows)}
    tiles, lower, numbers = source.demote_tiles(target, head_dim, codes, rows.__getitem__)
    return target.pack_tiles(tiles, lower), numbers
