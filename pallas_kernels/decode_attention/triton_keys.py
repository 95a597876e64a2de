"""What the Triton attention kernels share: keys and values in tiles, their softmax and loads.

Triton cannot slice or join values, so everything with channels is a list of pieces, the same
channel ranges for all tiers.
"""

from collections.abc import Callable, Sequence
from functools import cache, reduce
from operator import add
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from ..codecs import Uniform
from ..codecs.outliers import beneath
from ..codecs.tiles import Tile
from ..pages import PageLayout, Pages
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

    @staticmethod
    def empty(rows: int, layout: PageLayout) -> "State":
        """Before the first key."""
        return State(
            jnp.full((rows,), -jnp.inf, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            tuple(jnp.zeros((rows, size), jnp.float32) for _, size in value_pieces(layout)),
        )

    def add(self, logits: Array, mix: Callable[[Array], Sequence[Array]]) -> "State":
        """Take in keys with base-2 `logits [rows, n]`, masked ones -inf; `mix` multiplies weights
        with the values, piece by piece.
        """
        maximum = jnp.maximum(self.maximum, logits.max(axis=1))
        safe = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        weights, rescale = jnp.exp2(logits - safe[:, None]), jnp.exp2(self.maximum - safe)
        mixed = mix(weights)
        pairs = zip(self.output, mixed, strict=True)
        output = tuple(old * rescale[:, None] + new for old, new in pairs)
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
        members = [pair for pair in zip(q, keys, strict=True) if pair[1].group == group]
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
    rows = row_channels(ref, at, piece)
    mask = jnp.broadcast_to(live[:, None], (live.size, piece[1]))
    return plgpu.load(rows, mask=mask, other=0.0).astype(dtype)


def chunk_key_index(first, count: int, head, chunk_len: int) -> tuple[Array, tuple]:
    """Numbers `[count]` of chunk keys from `first` on, and their clamped place in `[B, C, d]`."""
    key = first + jnp.arange(count, dtype=jnp.int32)
    return key, (head, jnp.minimum(key, chunk_len - 1))


def exact_keys(ref, at: tuple, live: Array, layout: PageLayout, dtype) -> list[CodeTile]:
    """Keys of the rows `at` of a Ref that are `live [n]`, piece by piece."""
    return [CodeTile(load_rows(ref, at, piece, live, dtype).T) for piece in key_pieces(layout)]


def mix_rows(ref, at: tuple, live: Array, layout: PageLayout, dtype) -> Callable:
    """`mix` of `State.add` for the values in the rows `at` of a Ref that are `live [n]`."""

    def mix(weights: Array) -> list[Array]:
        weights = weights.astype(dtype)
        return [
            matmul(weights, load_rows(ref, at, piece, live, dtype))
            for piece in value_pieces(layout)
        ]

    return mix
