"""What the Triton kernels of this operation share: keys and values of pages, of the recent window
and of the chunk, tile by tile.

Triton cannot slice or join values, so everything with channels is a list of pieces, the same
channel ranges for all tiers.
"""

from collections.abc import Callable, Sequence
from functools import cache, reduce
from operator import add
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from ..codecs import Levels, Uniform
from ..codecs.outliers import Outliers, beneath
from ..codecs.packing import code_of
from ..codecs.scales import outliers_of
from ..codecs.tiles import Tile
from ..pages import PageLayout, Pages, page_column
from ..rope import turned
from .stream import Scale

LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453


class CodeTile(NamedTuple):
    """Codes of some channels of `n` keys or values: `scale * codes + zero`, if there are any."""

    codes: Array  # float32 or bfloat16 [channels, n]
    group: int | None = None  # tiles of one group have the same scale and zero point
    scale: Array | None = None  # float32 [n]
    zero: Array | None = None  # float32 [n]

    def values(self) -> Array:
        """The keys or values float32 `[channels, n]`."""
        scaled = self.codes if self.scale is None else self.codes * self.scale[None, :]
        return scaled if self.zero is None else scaled + self.zero[None, :]


class State(NamedTuple):
    """Online softmax of `rows` pairs, in powers of two; unnormalised output in channel pieces."""

    maximum: Array  # float32 [rows]
    total: Array  # float32 [rows]
    output: tuple[Array, ...]  # float32 [rows, channels of a piece]

    def add(self, logits: Array, mix: Callable[[Array], Sequence[Array]]) -> "State":
        """Take in keys with base-2 `logits [rows, n]`, masked ones -inf; `mix` multiplies weights
        with the values, piece by piece.
        """
        maximum = jnp.maximum(self.maximum, logits.max(axis=1))
        safe = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        weights, rescale = jnp.exp2(logits - safe[:, None]), jnp.exp2(self.maximum - safe)
        mixed = mix(weights)
        output = tuple(
            old * rescale[:, None] + new for old, new in zip(self.output, mixed, strict=True)
        )
        return State(maximum, self.total * rescale + weights.sum(axis=1), output)


@cache
def key_tiles(layout: PageLayout) -> tuple[tuple[Tile, ...], ...]:
    """Tiles of each tier's keys, cut at the same channels. ValueError where Triton cannot."""
    return _tiles(layout, "key")


@cache
def value_tiles(layout: PageLayout) -> tuple[tuple[Tile, ...], ...]:
    """Tiles of each tier's values, cut at the same channels. ValueError where Triton cannot."""
    return _tiles(layout, "value")


def key_pieces(layout: PageLayout) -> list[tuple[int, int]]:
    """Channel ranges (first, size) in which keys and queries are read."""
    return [(tile.channel, tile.channels) for tile in key_tiles(layout)[0]]


def value_pieces(layout: PageLayout) -> list[tuple[int, int]]:
    """Channel ranges (first, size) in which values are read and outputs are kept."""
    return [(tile.channel, tile.channels) for tile in value_tiles(layout)[0]]


def _tiles(layout: PageLayout, tensor: str) -> tuple[tuple[Tile, ...], ...]:
    codecs = [beneath(getattr(fmt, tensor)) for fmt in layout.formats]
    # cut where pairs of channels are, as four bits are
    halves = [Uniform(4)] if layout.rope and tensor == "key" else []
    tiles = tuple(codec.tiles(layout.head_dim, *codecs, *halves) for codec in codecs)
    for tile in tiles[0]:
        if tile.channels < 16 or tile.channels & (tile.channels - 1):
            names = "+".join(fmt.name for fmt in layout.formats)
            raise ValueError(
                f"formats {names} at head_dim={layout.head_dim} make a {tensor} piece of "
                f"{tile.channels} channels; Triton needs a power of two of at least 16: choose "
                "fewer groups or other bits, or use implementation='xla'"
            )
    if layout.tokens < 16 or layout.tokens & (layout.tokens - 1):
        raise ValueError(
            f"tokens={layout.tokens} must be a power of two of at least 16 for Triton; use "
            "implementation='xla'"
        )
    return tiles


def check_pool(pages: Pages) -> None:
    """Raises ValueError where Pallas would address the payload wrongly.

    Its Triton backend takes signed 32-bit offsets for arrays of up to 2**32 bytes, and those beyond
    2**31 wrap (jax 0.10.2, seen in PTX: `mad.lo.s32`, then `cvt.s64.s32`). Larger arrays get 64-bit
    offsets; arrays of wider numbers have fewer than 2**31 elements.
    """
    if 2**31 < pages.payload.size <= 2**32:
        raise ValueError(
            f"a payload of {pages.payload.size} bytes ({pages.num_pages} pages) is between 2 and 4 "
            "GiB, which Triton kernels cannot address; take more or fewer pages, or "
            "implementation='xla'"
        )


def matmul(a: Array, b: Array) -> Array:
    """`a [m, k]` times `b [k, n]` in float32 sums; float32 factors are not rounded to TF32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def logits_of(q: Sequence[Array], keys: Sequence[CodeTile], bias: Array, scale: Scale) -> Array:
    """Base-2 logits `[rows, n]` of `q` (pieces `[rows, channels]`) against `keys`; `bias [n]` is
    -inf where there is no key, else 0.
    """
    factor = scale.sm_scale * (LOG2_E if scale.soft_cap is None else 1 / scale.soft_cap)
    logits = jnp.zeros((1, 1), jnp.float32) if scale.soft_cap is not None else bias[None, :]
    for group in dict.fromkeys(tile.group for tile in keys):
        members = [
            (piece, tile) for piece, tile in zip(q, keys, strict=True) if tile.group == group
        ]
        dots = reduce(add, (matmul(piece, tile.codes) for piece, tile in members))
        scale_row, zero_row = members[0][1].scale, members[0][1].zero
        if zero_row is not None:
            sums = reduce(add, (piece.astype(jnp.float32).sum(axis=1) for piece, _ in members))
            logits += sums[:, None] * (zero_row * factor)[None, :]
        logits += dots * (factor if scale_row is None else (scale_row * factor)[None, :])
    if scale.soft_cap is None:
        return logits
    return scale.soft_cap * LOG2_E * jnp.tanh(logits) + bias[None, :]


def gathered(ref, *indices):
    """A Ref of the elements `indices` (scalars and arrays that broadcast): the interpreter does not
    take slices beside arrays.
    """
    shape = jnp.broadcast_shapes(*map(jnp.shape, indices))
    return ref.at[tuple(jnp.broadcast_to(i, shape) if jnp.ndim(i) else i for i in indices)]


def row_channels(ref, at: tuple, piece: tuple[int, int]):
    """A Ref of channels `piece` of the rows that `at` (scalars, vectors `[n]`) names: `[n, c]`."""
    rows = (i[:, None] if jnp.ndim(i) else i for i in at)
    return gathered(ref, *rows, piece[0] + jnp.arange(piece[1], dtype=jnp.int32)[None, :])


def load_rows(ref, at: tuple, piece: tuple[int, int], live: Array, dtype) -> Array:
    """`row_channels` as values of `dtype`, zeros where not `live [n]` (those are never read)."""
    return plgpu.load(
        row_channels(ref, at, piece),
        mask=jnp.broadcast_to(live[:, None], (live.size, piece[1])),
        other=0.0,
    ).astype(dtype)


def chunk_key_index(first, count: int, head, chunk_len: int) -> tuple[Array, tuple]:
    """Numbers `[count]` of chunk keys from `first` on, and their clamped place in `[B, C, d]`."""
    key = first + jnp.arange(count, dtype=jnp.int32)
    return key, (head, jnp.minimum(key, chunk_len - 1))


class StoredBlocks(NamedTuple):
    """`n // T` successive blocks of a tier of one head: which, and how they are read."""

    # Refs: payload, meta and q; for learned codecs tables and layer, for keys that need their
    # rotary embedding also position
    inputs: Any
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
        pairs = []
        for (channel, channels), first, second in zip(
            key_pieces(self.layout), keys[:half], keys[half:], strict=False
        ):
            frequency = plgpu.load(
                gathered(self.inputs.frequencies, channel + jnp.arange(channels, dtype=jnp.int32))
            )
            angle = frequency[:, None] * position[None, :]
            pairs.append(turned(first, second, jnp.cos(angle), jnp.sin(angle)))
        return [first for first, _ in pairs] + [second for _, second in pairs]

    def mix(self, weights: Array) -> list[Array]:
        """`weights [rows, n]` times the values: pieces `[rows, channels]`."""
        dtype, scaled, mixed = self.inputs.q.dtype, {}, []
        for tile in self._read("value"):
            if tile.group not in scaled:
                factors = weights if tile.scale is None else weights * tile.scale[None, :]
                scaled[tile.group] = (
                    factors.astype(dtype),
                    None if tile.zero is None else (weights * tile.zero[None, :]).sum(axis=1),
                )
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
            CodeTile(
                self._codes(tile, first, planes, tensor), tile.scale_row, *numbers[tile.scale_row]
            )
            for tile in tiles
        ]
        return (
            self._with_outliers(codec, tiles, found, first, first_meta)
            if isinstance(codec, Outliers)
            else found
        )

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
        outliers = list(
            zip(index, [large for large, _ in pairs] + [small for _, small in pairs], strict=True)
        )
        placed = []
        for tile, coded in zip(tiles, found, strict=True):
            values = coded.values()
            channel = tile.channel + jnp.arange(tile.channels, dtype=jnp.int32)[:, None]
            for index, value in outliers:
                values = jnp.where(channel == index, value[None, :], values)
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
                planes[row, tile.channels] = self._bytes(
                    first, row + jnp.arange(tile.channels, dtype=jnp.int32)
                )
            loaded.append(planes[row, tile.channels].astype(jnp.int32))
        codes = tile.unpack(loaded)
        if tile.scale_row is None:  # an exact number of a dead lane may be NaN
            codes = jnp.where(self.valid.reshape(1, -1), codes, 0.0)
        return codes

    def _bytes(self, first: Array, rows: Array) -> Array:
        """Payload rows `first [blocks]` + `rows [m]` of all blocks, uint8 `[m, n]`."""
        at = first[:, None, None] + rows[None, :, None]
        plane = plgpu.load(
            gathered(self.inputs.payload, self.page[:, None, None], at, self._lanes()[None])
        )
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
        codes = code_of(
            group,
            codec.bits,
            self.layout.head_dim // codec.channels,
            lambda row: self._bytes(first, row).astype(jnp.int32),
        )
        at = (self.inputs.layer[0], lax.rem(self.head, jnp.int32(table.shape[1])))
        at = (
            (*at, codes)
            if isinstance(codec, Levels)
            else (*at, group[:, None], codes, within[:, None])
        )
        return plgpu.load(gathered(table, *at)).astype(jnp.float32)

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
    return StoredBlocks(
        inputs, layout, tier, head, live, page, number - index * layout.blocks[tier], valid
    )
