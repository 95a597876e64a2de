"""A block of T tokens in VMEM: what the TPU kernel of decode attention makes of its bytes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from ..codecs.outliers import Outliers, beneath
from ..codecs.packing import unpack_planes
from ..codecs.scales import outliers_of
from ..codecs.tiles import Tile
from ..rope import turned
from .mosaic_tpu_stream import Plan, Refs

LANES = 128  # of a register, among which a look-up chooses


class Run(NamedTuple):
    """Adjacent tiles that share scale and zero point, or have none: one product takes them all."""

    tiles: tuple[Tile, ...]

    @property
    def channels(self) -> slice:
        """Where they lie."""
        return slice(self.tiles[0].channel, self.tiles[-1].channel + self.tiles[-1].channels)


def runs_of(codec: Any, head_dim: int) -> list[Run]:
    """The runs of one tensor's tiles, outliers left aside."""
    runs: list[list[Tile]] = []
    for tile in beneath(codec).tiles(head_dim):
        if runs and runs[-1][0].scale_row == tile.scale_row:
            runs[-1].append(tile)
        else:
            runs.append([tile])
    return [Run(tuple(run)) for run in runs]


def matmul(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Product in the type of `a`, sums in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    b, float32 = b.astype(a.dtype), jnp.float32
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=float32)


class StoredBlock:
    """A block of a chunk in VMEM. Every plane is read once."""

    def __init__(self, r: Refs, plan: Plan, tier: int, buffer, page: int, block: int):
        self.refs, self.layout = r, plan.layout
        self._at, self._tier, self._index = (buffer, page), tier, block
        fmt = plan.layout.formats[tier]
        k_rows, v_rows = fmt.rows(plan.layout.head_dim)
        v_start, v_meta_start = plan.layout.value_start(tier)
        self._codecs = beneath(fmt.key), beneath(fmt.value)
        counts = (c.count if isinstance(c, Outliers) else 0 for c in (fmt.key, fmt.value))
        self.outliers = tuple(counts)  # rows behind those of the codec
        self._payload = (block * k_rows, v_start + block * v_rows)
        self._metadata = (block * fmt.key.meta_rows, v_meta_start + block * fmt.value.meta_rows)

    def codes(self, run: Run, tensor: int) -> Array:
        """Float32 codes `[channels, T]` of K (0) or V (1), or what the learned table has there."""
        if self._codecs[tensor].learned:
            return self._looked_up(tensor)
        planes: dict[tuple[int, int], Array] = {}
        parts = []
        for tile in run.tiles:
            keys = [(row, tile.channels) for row in tile.rows]
            for row, rows in keys:
                if (row, rows) not in planes:
                    planes[row, rows] = self._plane(self._payload[tensor] + row, rows)
            parts.append(tile.unpack([planes[key] for key in keys]))
        return jnp.concatenate(parts, axis=0)

    def meta(self, row: int, tensor: int) -> Array:
        """Bits of a metadata row of K (0) or V (1), int32 `[1, T]`."""
        at = (*self._at, pl.ds(self._metadata[tensor] + row, 1))
        return self.refs.meta_buffer[at].astype(jnp.int32)

    def scale_zero(self, run: Run, tensor: int) -> tuple[Array | None, Array | None]:
        """Scale and zero point of a run of K (0) or V (1), float32 `[1, T]`, if there are any."""
        return run.tiles[0].scale_zero(lambda row: self.meta(row, tensor))

    def values(self, runs: Sequence[Run], tensor: int) -> Array:
        """K (0) or V (1) float32 `[d, T]`, meaningless in dead lanes."""
        parts = []
        for run in runs:
            part, (scale, zero) = self.codes(run, tensor), self.scale_zero(run, tensor)
            part = part if scale is None else part * scale
            parts.append(part if zero is None else part + zero)
        values, codec = jnp.concatenate(parts, axis=0), self._codecs[tensor]
        channel = lax.broadcasted_iota(jnp.int32, values.shape, 0)
        for i in range(self.outliers[tensor] // 2):
            rows = i, self.outliers[tensor] // 2 + i
            pair = outliers_of(*(self.meta(codec.meta_rows + row, tensor) for row in rows))
            for row, value in zip(rows, pair, strict=True):
                here = self._plane(self._payload[tensor] + codec.rows(len(values)) + row, 1)
                values = jnp.where(channel == here, value, values)
        return values

    def position(self) -> Array:
        """int32 `[1, T]`."""
        return self.refs.position_buffer[(*self._at, pl.ds(self._index, 1))].astype(jnp.int32)

    def _plane(self, row: int, rows: int) -> Array:
        return self.refs.payload_buffer[(*self._at, pl.ds(row, rows))].astype(jnp.int32)

    def _looked_up(self, tensor: int) -> Array:
        codec, table = self._codecs[tensor], self.refs.levels[self._tier, tensor]
        head_dim = self.layout.head_dim
        codes = unpack_planes(self._plane(self._payload[tensor], codec.rows(head_dim)), codec.bits)
        groups, tokens = codes.shape
        codes = jnp.broadcast_to(codes[:, None, :], (groups, codec.channels, tokens))
        codes = codes.reshape(head_dim, tokens)

        def of_levels(first: int) -> Array:
            """What a register holds: all of a table, or half of one of 256."""
            levels = jnp.broadcast_to(table[:, first : first + LANES], (head_dim, LANES))
            index = codes & (LANES - 1)
            return jnp.take_along_axis(levels, index, axis=1, mode="promise_in_bounds")

        found = of_levels(0)
        if table.shape[1] == LANES:
            return found
        return jnp.where(codes < LANES, found, of_levels(LANES))


def logits_of(
    block: StoredBlock, runs: Sequence[Run], queries: Sequence[Array], sums: Sequence[Array]
) -> Array:
    """Products `[G, T]` of the queries with the keys of a block: `scale (q . codes) + zero sum(q)`
    where decoded keys are not needed.
    """
    if block.layout.rope is not None or block.outliers[0]:
        keys, q = block.values(runs, 0), block.refs.q[...]
        return matmul(q, keys if block.layout.rope is None else _turned(block, keys), (1, 0))
    logits = []
    for run, q, q_sum in zip(runs, queries, sums, strict=True):
        product, (scale, zero) = matmul(q, block.codes(run, 0), (1, 0)), block.scale_zero(run, 0)
        if scale is not None:
            product = product * scale
        if zero is not None:
            product = product + q_sum * zero
        logits.append(product)
    return sum(logits[1:], start=logits[0])


def mix_of(
    block: StoredBlock, runs: Sequence[Run], weights: Array, live: Array, dtype
) -> list[Array]:
    """Weights `[G, T]` times the values of a block, `[G, channels]` of each run: `(w scale) . codes
    + sum(w zero)`.
    """
    if block.outliers[1]:
        return [matmul(weights.astype(dtype), jnp.where(live, block.values(runs, 1), 0.0), (1, 1))]
    parts = []
    for run in runs:
        codes, (scale, zero) = block.codes(run, 1), block.scale_zero(run, 1)
        if scale is None:
            parts.append(matmul(weights.astype(dtype), jnp.where(live, codes, 0.0), (1, 1)))
            continue
        part = matmul((weights * jnp.where(live, scale, 0.0)).astype(dtype), codes, (1, 1))
        if zero is not None:
            part = part + (weights * jnp.where(live, zero, 0.0)).sum(axis=1, keepdims=True)
        parts.append(part)
    return parts


def _turned(block: StoredBlock, keys: Array) -> Array:
    """Keys `[d, T]` with the rotary embedding of their positions."""
    half = block.layout.head_dim // 2
    angle = block.refs.frequencies[...] * block.position().astype(jnp.float32)
    return jnp.concatenate(turned(keys[:half], keys[half:], jnp.cos(angle), jnp.sin(angle)), axis=0)
