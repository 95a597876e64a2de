"""One layer's tables of each learned codec, from the keys or values of its heads and how much their
errors cost.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.calibration.kmeans import weighted_kmeans
from diffkv_jax.pallas_kernels.codecs import (
    Coupled,
    Levels,
    LowRank,
    Outliers,
    StaticLevels,
    learned_part,
)
from diffkv_jax.pallas_kernels.codecs.coupled import nearest
from diffkv_jax.pallas_kernels.codecs.levels import normalised, token_range
from diffkv_jax.pallas_kernels.codecs.scales import needs_wide

NUMBERS = 2**17  # that one layer's levels are learned from, evenly spaced over all


@dataclass(frozen=True)
class Learning:
    """How tables are learned: iterations of k-means, and whether levels keep mean and deviation
    (Q-Norm; None: at two bits or fewer).
    """

    iterations: int
    q_norm: bool | None


def learn_table(codec: Any, x: Array, fisher: Array, key: Array, how: Learning) -> Array:
    """float32 `[K, *table_shape]` of a codec from `x`, `fisher` float32 `[K, d, n]`: n tokens as a
    block of each head.

    Outliers, which are kept apart, do not count.
    """
    part = learned_part(codec)
    # fitted to what the codec loses, it does not change what the codec sees
    if isinstance(codec, LowRank):
        codec = codec.codec
    share = codec.share if isinstance(codec, Outliers) else 0.0
    if isinstance(part, StaticLevels):
        return _static_levels(part, x, fisher, share, key, how)
    if isinstance(codec, Outliers):
        x, taken = codec.without_outliers(x)
        fisher = jnp.where(taken, 0.0, fisher)
    if isinstance(part, Levels):
        levels = _levels(part.bits, normalised(x, *token_range(x)), fisher, key, how)
        return jnp.tile(levels, (x.shape[0], 1))
    assert isinstance(part, Coupled)
    return _codebooks(part, x, fisher, key, how)


def as_stored(tables: np.ndarray) -> np.ndarray:
    """The float32 tables `[L, K, ...]` of all layers in float16; in bfloat16 where that does not
    hold all of them.
    """
    largest = np.abs(tables).max(axis=tuple(range(2, tables.ndim)))
    return tables.astype(jnp.bfloat16 if needs_wide(jnp.asarray(largest)).any() else np.float16)


def _codebooks(codec: Coupled, x: Array, fisher: Array, key: Array, how: Learning) -> Array:
    """Coupled Quantization (arXiv:2405.03917): the weight of a vector of channels is the squared
    norm of its gradient.
    """
    heads, d, n = x.shape
    # [K * groups, n, channels]
    by_group = (jnp.swapaxes(part.reshape(-1, codec.channels, n), 1, 2) for part in (x, fisher))
    vectors, weight = by_group
    return weighted_kmeans(
        vectors, weight.sum(axis=-1), key, 2**codec.bits, how.iterations
    ).reshape(heads, *codec.table_shape(d))


def _static_levels(
    codec: StaticLevels, x: Array, fisher: Array, share: float, key: Array, how: Learning
) -> Array:
    """KVQuant's keys (arXiv:2401.18079, sec. 3): a channel's range without the `share` of outliers,
    and the layer's levels on it.
    """
    # [K, d, 1]
    low, high = jnp.quantile(x, jnp.array([share / 2, 1 - share / 2]), axis=-1, keepdims=True)
    half, middle = (high - low) / 2, (high + low) / 2
    scaled = normalised(x, half, middle)
    levels = _levels(codec.bits, scaled, jnp.where(jnp.abs(scaled) <= 1, fisher, 0.0), key, how)
    return (levels * half + middle)[..., None]


def _levels(bits: int, scaled: Array, weight: Array, key: Array, how: Learning) -> Array:
    """Ascending levels `[2**bits]` for numbers on the scale -1 to 1, those of weight 0 left out
    (KVQuant, arXiv:2401.18079, sec. 3.3).

    Q-Norm (appendix): moved and stretched, so that what is decoded has the mean and the deviation
    of what was coded.
    """
    step = -(-scaled.size // NUMBERS)
    values, weight = (x.reshape(-1)[::step] for x in (scaled, weight))
    levels = jnp.sort(
        weighted_kmeans(values[None, :, None], weight[None], key, 2**bits, how.iterations)[0, :, 0]
    )
    if not (bits <= 2 if how.q_norm is None else how.q_norm):
        return levels
    coded = levels[nearest(values[:, None], levels[:, None])]
    counts = jnp.where(weight > 0, 1.0, 0.0)
    (mean, deviation), (coded_mean, coded_deviation) = (
        _moments(values, counts),
        _moments(coded, counts),
    )
    return (levels - coded_mean) * deviation / jnp.where(
        coded_deviation > 0, coded_deviation, 1.0
    ) + mean


def _moments(x: Array, counts: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of the numbers that count."""
    mean = jnp.average(x, weights=counts)
    return mean, jnp.sqrt(jnp.average(jnp.square(x - mean), weights=counts))
