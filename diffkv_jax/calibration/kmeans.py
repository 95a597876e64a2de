"""Weighted k-means: k-means++ seeding, then Lloyd's iterations, as one compiled program."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.pallas_kernels.codecs.coupled import nearest
from diffkv_jax.pallas_kernels.codecs.scales import unit_of


@partial(jax.jit, static_argnames=("clusters", "iterations"))
def weighted_kmeans(x: Array, weight: Array, key: Array, clusters: int, iterations: int) -> Array:
    """Centroids float32 `[P, clusters, c]` that lessen sum of `weight` times squared distance to
    the nearest, for `P` problems.

    Coupled Quantization (arXiv:2405.03917): the weights are Fisher information. k-means++ (Arthur
    and Vassilvitskii, 2007) draws each seed with probability proportional to weight times squared
    distance to the seeds before it. A centroid without points stays.

    Args:
        x: float32 `[P, n, c]`, n > 0.
        weight: float32 `[P, n]`, not negative; where all are zero they count as equal.
    """
    keys = jax.random.split(key, x.shape[0])
    unit, inverse = unit_of(jnp.abs(x).max(axis=(-1, -2), keepdims=True))

    def solve(problem: tuple[Array, Array, Array]) -> Array:
        return _kmeans(*problem, clusters, iterations)

    # squares neither overflow nor vanish
    return lax.map(solve, (x * inverse, weight, keys), batch_size=16) * unit


def _kmeans(x: Array, weight: Array, key: Array, clusters: int, iterations: int) -> Array:
    mean = weight.mean()
    weight = jnp.where(mean > 0, weight / jnp.where(mean > 0, mean, 1.0), 1.0)

    def improve(_: int, centroids: Array) -> Array:
        member = nearest(x, centroids)
        total = jax.ops.segment_sum(weight, member, clusters)
        sums = jax.ops.segment_sum(weight[:, None] * x, member, clusters)
        means = sums / jnp.where(total > 0, total, 1.0)[:, None]
        return jnp.where(total[:, None] > 0, means, centroids)

    return lax.fori_loop(0, iterations, improve, _seeds(x, weight, key, clusters))


def _seeds(x: Array, weight: Array, key: Array, clusters: int) -> Array:
    """k-means++: `[clusters, c]` of the points."""

    def draw(i: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        seeds, distance = state
        cumulative = jnp.cumsum(weight * distance)
        at = jax.random.uniform(jax.random.fold_in(key, i)) * cumulative[-1]
        chosen = x[jnp.minimum(jnp.searchsorted(cumulative, at, side="right"), x.shape[0] - 1)]
        new = jnp.square(x - chosen).sum(axis=-1)
        return seeds.at[i].set(chosen), jnp.where(i == 0, new, jnp.minimum(distance, new))

    start = jnp.zeros((clusters, x.shape[1]), jnp.float32), jnp.ones(x.shape[0], jnp.float32)
    return lax.fori_loop(0, clusters, draw, start)[0]
