"""Learned non-uniform levels of a token's or a channel's range (KVQuant, arXiv:2401.18079)."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jax import Array, lax

from . import scales
from .codec import Fitting
from .coupled import BITS, Coupled, nearest
from .packing import fills_bytes, pack_planes, packed_rows, unpack_planes
from .tiles import Tile, Tiled, looked_up

NUMBERS = 2**17  # that one layer's levels are learned from, evenly spaced over all


@dataclass(frozen=True)
class Levels(Tiled):
    """Codec of one tensor (V): each channel takes the nearest of `2**bits` levels, ascending in -1
    to 1, of the token's range.

    A block is `[B, ..., head_dim, T]`; its payload is uint8 `[B, ..., rows, T]`, its metadata
    float16 `[B, ..., 2, T]`: half of the range, and its middle (`scales`). `table` float16 `[B,
    2**bits]` holds the levels (`with_table` sets it).
    """

    channels = 1  # that share a code

    bits: int
    table: Array | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} of learned levels must be one of {BITS}")

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        if not fills_bytes(self.bits, head_dim):
            raise ValueError(
                f"head_dim={head_dim} at {self.bits} bits must fill bytes: choose other bits"
            )
        return packed_rows(self.bits, head_dim)

    @property
    def meta_rows(self) -> int:
        """Half of the range, and its middle."""
        return 2

    @property
    def native(self) -> tuple[int, int]:
        """See `Codec.native`."""
        return 192 + self.bits, self.channels

    @property
    def learned(self) -> bool:
        """It is."""
        return True

    def table_shape(self, head_dim: int) -> tuple[int, ...]:
        """Shape of one head's table."""
        del head_dim
        return (2**self.bits,)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """`[B, ..., d, T]` to (payload, metadata): of equally near levels the lower."""
        stored = _range_bits(x.astype(jnp.float32))
        half, middle = _range_of(*stored)
        levels = self._levels(x.ndim)
        between = (levels[1:] + levels[:-1]) / 2
        scaled = normalised(x.astype(jnp.float32), half, middle)

        def count(i: int, codes: Array) -> Array:
            return codes + (scaled > between[i])

        codes = lax.fori_loop(0, len(between), count, jnp.zeros(x.shape, jnp.int32))
        return pack_planes(codes, self.bits), scales.as_half(jnp.concatenate(stored, axis=-2))

    def decode(self, payload: Array, meta: Array) -> Array:
        """Back to float32 `[B, ..., d, T]`: `half * level + middle`."""
        codes = unpack_planes(payload, self.bits)
        half, middle = _range_of(*jnp.split(meta, 2, axis=-2))
        flat = codes.reshape(codes.shape[0], -1).astype(jnp.int32)
        assert self.table is not None
        levels = jnp.take_along_axis(self.table.astype(jnp.float32), flat, axis=1)
        return levels.reshape(codes.shape) * half + middle

    def tile(self, head_dim: int, channel: int, channels: int) -> Tile:
        """Codes that are looked up, on the scale of the token's range."""
        del head_dim
        return Tile(channel, channels, (), 0, 1, looked_up)

    def fit(self, x: Array, fisher: Array, key: Array, how: Fitting) -> Array:
        """The layer's levels, the same for all its heads."""
        levels = fitted_levels(self.bits, normalised(x, *token_range(x)), fisher, key, how)
        return jnp.tile(levels, (x.shape[0], 1))

    def _levels(self, ndim: int) -> Array:
        """`[2**bits, B, 1, ...]`, as many axes as a block and one before."""
        assert self.table is not None, (
            "a learned codec works once `with_table` has given it its layer's tables"
        )
        levels = self.table.astype(jnp.float32).T
        return levels.reshape(*levels.shape, *(1,) * (ndim - 1))


def token_range(x: Array) -> tuple[Array, Array]:
    """Half range and middle of each token, as stored: `[..., d, T]` to float32 `[..., 1, T]`."""
    return _range_of(*_range_bits(x))


def _range_bits(x: Array) -> tuple[Array, Array]:
    high, low = (scales.saturated(end(axis=-2, keepdims=True)) for end in (x.max, x.min))
    half, middle = (high - low) / 2, (high + low) / 2
    return scales.pair_bits(half, middle, scales.needs_wide(half, middle))


def _range_of(half: Array, middle: Array) -> tuple[Array, Array]:
    return scales.scale_of(half), scales.zero_of(half, middle)


def normalised(x: Array, half: Array, middle: Array) -> Array:
    """`x` on the scale where its range is -1 to 1; 0 where it has none."""
    return (x - middle) / jnp.where(half > 0, half, 1.0)


@dataclass(frozen=True)
class StaticLevels(Coupled):
    """Codec of K: learned levels of each channel's range in the calibration, no metadata.

    The layer's levels, spread over each channel's range, are a codebook a channel: `table` float16
    or bfloat16 `[B, head_dim, 2**bits, 1]`, each ascending. Where it runs: as `Coupled`.
    """

    channels: int = field(default=1, init=False)

    def rank(self, x: Array) -> Array:
        """What tells outliers `[B, ..., d, T]`: `x` on the scale of each channel's lowest and
        highest level.
        """
        low, high = (self._codebooks()[:, :, level, 0] for level in (0, -1))
        low, span = (y.reshape(y.shape[0], *(1,) * (x.ndim - 3), -1, 1) for y in (low, high - low))
        return (x - low) / jnp.where(span > 0, span, 1.0)

    def fit(
        self, x: Array, fisher: Array, key: Array, how: Fitting, outliers: float = 0.0
    ) -> Array:
        """A channel's range without its share of `outliers`, and the layer's levels on it."""
        ends = jnp.array([outliers / 2, 1 - outliers / 2])
        low, high = jnp.quantile(x, ends, axis=-1, keepdims=True)  # [K, d, 1]
        half, middle = (high - low) / 2, (high + low) / 2
        scaled = normalised(x, half, middle)
        weight = jnp.where(jnp.abs(scaled) <= 1, fisher, 0.0)
        levels = fitted_levels(self.bits, scaled, weight, key, how)
        return (levels * half + middle)[..., None]


def fitted_levels(bits: int, scaled: Array, weight: Array, key: Array, how: Fitting) -> Array:
    """Ascending levels `[2**bits]` for numbers on the scale -1 to 1, those of weight 0 left out
    (sec. 3.3).

    Q-Norm (appendix): moved and stretched, so that what is decoded has the mean and the deviation
    of what was coded.
    """
    step = -(-scaled.size // NUMBERS)
    values, weight = (x.reshape(-1)[::step] for x in (scaled, weight))
    levels = jnp.sort(how.kmeans(values[None, :, None], weight[None], key, 2**bits)[0, :, 0])
    if not (bits <= 2 if how.q_norm is None else how.q_norm):
        return levels
    coded = levels[nearest(values[:, None], levels[:, None])]
    counts = jnp.where(weight > 0, 1.0, 0.0)
    mean, deviation = _moments(values, counts)
    coded_mean, coded_deviation = _moments(coded, counts)
    coded_deviation = jnp.where(coded_deviation > 0, coded_deviation, 1.0)
    return (levels - coded_mean) * deviation / coded_deviation + mean


def _moments(x: Array, counts: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of the numbers that count."""
    mean = jnp.average(x, weights=counts)
    return mean, jnp.sqrt(jnp.average(jnp.square(x - mean), weights=counts))
