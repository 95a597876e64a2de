"""One block of K or V inside a kernel, tile by tile: encoding and demotion, shared by the Triton
and the TPU kernels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from .formats import Codec, KVFormat
from .full import Full
from .tiles import Tile
from .uniform import Uniform

Planes = dict[int, Array]  # {first payload row: bytes int32 [channels, T]}
Meta = dict[int, Array]  # {metadata row: bits int32 [T]}


def head_dim_of(codec: Codec, rows: int) -> int:
    """The head_dim of a payload of `rows` rows."""
    return (
        rows // jnp.dtype(codec.dtype).itemsize
        if isinstance(codec, Full)
        else rows * 8 // codec.bits
    )


class Parts(NamedTuple):
    """Refs or Arrays of a `Block`; None for the metadata of codecs that have none."""

    k_payload: Any
    v_payload: Any
    k_meta: Any
    v_meta: Any


def parts_of(fmt: KVFormat, parts: Sequence) -> Parts:
    """Those given, in the order of `Parts`, without the metadata that the codecs of `fmt` do not
    have.
    """
    k_payload, v_payload, *metas = parts
    k_meta = metas.pop(0) if fmt.key.meta_rows else None
    return Parts(k_payload, v_payload, k_meta, metas.pop(0) if fmt.value.meta_rows else None)


def encode_block(
    codec: Codec, head_dim: int, values: Callable[[Tile], Array]
) -> tuple[Planes, Meta]:
    """`Codec.encode` of a block of which `values(tile)` reads a tile as float32 `[channels, T]`."""
    tiles = codec.tiles(head_dim)
    return _packed(codec, tiles, [values(tile) for tile in tiles])


def demote_block(
    source: Codec,
    target: Codec,
    head_dim: int,
    planes: Callable[[int, int], Array],
    meta: Callable[[int], Array],
) -> tuple[Planes, Meta]:
    """Requantise a block of `source` to `target`: on the integer codes where the groups match, else
    through float32.

    `planes(row, channels)` reads payload rows as int32 `[channels, T]`, `meta(row)` one metadata
    row `[T]` as it is stored.
    """
    tiles, target_tiles = source.tiles(head_dim, target), target.tiles(head_dim, source)
    codes = [tile.unpack([planes(row, tile.channels) for row in tile.rows]) for tile in tiles]
    rows = {row: meta(row) for row in range(source.meta_rows)}
    if isinstance(source, Uniform) and source.can_demote_to(target):
        lower, rows = source.demote_tiles(target, [code.astype(jnp.int32) for code in codes], rows)
        return target.pack_tiles(target_tiles, lower), rows
    return _packed(
        target,
        target_tiles,
        [tile.value(code, rows.__getitem__) for tile, code in zip(tiles, codes, strict=True)],
    )


def _packed(codec: Codec, tiles: Sequence[Tile], values: Sequence[Array]) -> tuple[Planes, Meta]:
    codes, meta = codec.encode_tiles(tiles, values)
    return codec.pack_tiles(tiles, codes), meta
