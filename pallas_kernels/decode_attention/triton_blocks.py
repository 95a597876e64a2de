"""Stored tokens as the Triton attention kernels read them: blocks of pages, tile by tile."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from ..codecs import Levels
from ..codecs.outliers import Outliers, beneath
from ..codecs.packing import code_of
from ..codecs.scales import outliers_of
from ..codecs.tiles import Tile
from ..pages import PageLayout, page_column
from ..rope import turned
from .triton_keys import CodeTile, gathered, key_pieces, key_tiles, matmul, value_tiles


class StoredBlocks(NamedTuple):
    """`n // T` successive blocks of a tier of one head: which, and how they are read."""

    inputs: Any  # Refs: payload, meta, q; tables and layer if learned, position if keys need RoPE
    layout: PageLayout
    tier: int
    head: Any
    live: Array  # bool [blocks] whether a block holds a token
    page: Array  # int32 [blocks] page ids, 0 where there is no token
    block: Array  # int32 [blocks] number of the block in its page
    valid: Array  # bool [blocks, T]

    def bias(self) -> Array:
        """-inf where there is no token, else 0: `[n]`."""
        return jnp.where(self.valid, 0.0, -jnp.inf).reshape(-1)

    def keys(self) -> list[CodeTile]:
        """The keys of all blocks side by side."""
        found = self._read("key")
        if self.layout.rope is not None:
            found = [CodeTile(key) for key in self._embedded([tile.values() for tile in found])]
        return [tile._replace(codes=tile.codes.astype(self.inputs.q.dtype)) for tile in found]

    def positions(self) -> Array:
        """int32 `[n]`; what lies in dead lanes means nothing."""
        at = gathered(self.inputs.position, self.page[:, None], self.block[:, None], self._lanes())
        return plgpu.load(at).astype(jnp.int32).reshape(-1)

    def _embedded(self, keys: Sequence[Array]) -> list[Array]:
        """Pieces of keys float32 `[channels, n]` turned as their positions ask: those of the first
        half are paired with the second's.
        """
        position, half = self.positions().astype(jnp.float32), len(keys) // 2
        pieces, pairs = key_pieces(self.layout), []
        for (channel, size), first, second in zip(pieces, keys[:half], keys[half:], strict=False):
            index = channel + jnp.arange(size, dtype=jnp.int32)
            frequency = plgpu.load(gathered(self.inputs.frequencies, index))
            angle = frequency[:, None] * position[None, :]
            pairs.append(turned(first, second, jnp.cos(angle), jnp.sin(angle)))
        return [first for first, _ in pairs] + [second for _, second in pairs]

    def mix(self, weights: Array) -> list[Array]:
        """`weights [rows, n]` times the values: pieces `[rows, channels]`."""
        dtype, scaled, mixed = self.inputs.q.dtype, {}, []
        for tile in self._read("value"):
            if tile.group not in scaled:
                factors = weights if tile.scale is None else weights * tile.scale[None, :]
                factors = factors.astype(dtype)
                shift = None if tile.zero is None else (weights * tile.zero[None, :]).sum(axis=1)
                scaled[tile.group] = factors, shift
            factors, shift = scaled[tile.group]
            part = matmul(factors, tile.codes.astype(dtype).T)
            mixed.append(part if shift is None else part + shift[:, None])
        return mixed

    def _read(self, tensor: Literal["key", "value"]) -> list[CodeTile]:
        """Keys or values of all blocks side by side; decoded where outliers are kept beside."""
        codec, planes = getattr(self.layout.formats[self.tier], tensor), {}
        tiles = (key_tiles if tensor == "key" else value_tiles)(self.layout)[self.tier]
        start, meta_start = (0, 0) if tensor == "key" else self.layout.value_start(self.tier)
        first = start + self.block * codec.rows(self.layout.head_dim)
        first_meta = meta_start + self.block * codec.meta_rows
        numbers = {tile.scale_row: self._scale_zero(tile, first_meta) for tile in tiles}
        found = [
            CodeTile(self._codes(t, first, planes, tensor), t.scale_row, *numbers[t.scale_row])
            for t in tiles
        ]
        if not isinstance(codec, Outliers):
            return found
        return self._with_outliers(codec, tiles, found, first, first_meta)

    def _with_outliers(
        self,
        codec: Outliers,
        tiles: Sequence[Tile],
        found: Sequence[CodeTile],
        first: Array,
        first_meta: Array,
    ) -> list[CodeTile]:
        """Decoded tiles whose outliers are in their places."""
        rows, meta_rows = codec.codec.rows(self.layout.head_dim), codec.codec.meta_rows
        half = codec.count // 2
        index = [
            self._bytes(first, rows + i + jnp.zeros(1, jnp.int32)).astype(jnp.int32)
            for i in range(codec.count)
        ]
        stored = [self._meta_row(first_meta, meta_rows + i) for i in range(codec.count)]
        pairs = [outliers_of(*pair) for pair in zip(stored[:half], stored[half:], strict=True)]
        value = [large for large, _ in pairs] + [small for _, small in pairs]
        placed = []
        for tile, coded in zip(tiles, found, strict=True):
            values = coded.values()
            channel = tile.channel + jnp.arange(tile.channels, dtype=jnp.int32)[:, None]
            for at, outlier in zip(index, value, strict=True):
                values = jnp.where(channel == at, outlier[None, :], values)
            placed.append(CodeTile(values))
        return placed

    def _lanes(self) -> Array:
        return jnp.arange(self.layout.tokens, dtype=jnp.int32)[None, :]

    def _codes(
        self, tile: Tile, first: Array, planes: dict, tensor: Literal["key", "value"]
    ) -> Array:
        """Codes float32 `[channels, n]` of a tile; `first [blocks]` payload row of the tensor,
        `planes` keeps what was loaded.
        """
        if not tile.rows:
            return self._looked_up(tile, first, tensor)
        loaded = []
        for row in tile.rows:
            if (row, tile.channels) not in planes:
                rows = row + jnp.arange(tile.channels, dtype=jnp.int32)
                planes[row, tile.channels] = self._bytes(first, rows)
            loaded.append(planes[row, tile.channels].astype(jnp.int32))
        codes = tile.unpack(loaded)
        if tile.scale_row is None:  # an exact number of a dead lane may be NaN
            codes = jnp.where(self.valid.reshape(1, -1), codes, 0.0)
        return codes

    def _bytes(self, first: Array, rows: Array) -> Array:
        """Payload rows `first [blocks]` + `rows [m]` of all blocks, uint8 `[m, n]`."""
        at = first[:, None, None] + rows[None, :, None]
        page, lanes = self.page[:, None, None], self._lanes()[None]
        plane = plgpu.load(gathered(self.inputs.payload, page, at, lanes))
        return plane.transpose(1, 0, 2).reshape(rows.size, self.valid.size)

    def _looked_up(self, tile: Tile, first: Array, tensor: Literal["key", "value"]) -> Array:
        """What the codes of a tile name in the head's learned table, float32 `[channels, n]`:
        numbers, or levels of the token's range.
        """
        codec = beneath(getattr(self.layout.formats[self.tier], tensor))
        table = self.inputs.tables[self.tier][tensor == "value"]
        channel = tile.channel + jnp.arange(tile.channels, dtype=jnp.int32)
        together = jnp.int32(codec.channels)
        group, within = lax.div(channel, together), lax.rem(channel, together)
        count = self.layout.head_dim // codec.channels
        codes = code_of(
            group, codec.bits, count, lambda row: self._bytes(first, row).astype(jnp.int32)
        )
        at = (self.inputs.layer[0], lax.rem(self.head, jnp.int32(table.shape[1])))
        entry = (codes,) if isinstance(codec, Levels) else (group[:, None], codes, within[:, None])
        return plgpu.load(gathered(table, *at, *entry)).astype(jnp.float32)

    def _scale_zero(self, tile: Tile, first: Array) -> tuple[Array | None, Array | None]:
        """float32 `[n]` scale and zero point of a tile, zeros where there is no token; `first
        [blocks]` metadata row of the tensor.
        """
        return tile.scale_zero(lambda row: self._meta_row(first, row))

    def _meta_row(self, first: Array, row: int) -> Array:
        """float16 `[n]`, zeros where there is no token."""
        at = gathered(self.inputs.meta, self.page[:, None], (first + row)[:, None], self._lanes())
        return plgpu.load(at, mask=self.valid, other=0.0).reshape(-1)


def stored_blocks(
    inputs, layout: PageLayout, tier: int, head, length, step, keys: int
) -> StoredBlocks:
    """Step number `step` of `keys` keys over the `length` tokens of a tier of a head."""
    lanes, count = layout.tokens, keys // layout.tokens
    number = step * count + jnp.arange(count, dtype=jnp.int32)
    live = number * lanes < length
    index = lax.div(number, jnp.int32(layout.blocks[tier]))
    column = jnp.where(live, page_column(tier, index, inputs.page_table.shape[1]), 0)
    page = plgpu.load(gathered(inputs.page_table, head, column), mask=live, other=0)
    valid = number[:, None] * lanes + jnp.arange(lanes, dtype=jnp.int32)[None, :] < length
    block = number - index * layout.blocks[tier]
    return StoredBlocks(inputs, layout, tier, head, live, page, block, valid)
