"""Which tier a token belongs to, from its mean significance (DiffKV, arXiv 2412.03131 sec. 4 and Algorithm 1; docs/design.md 1)."""

import jax.numpy as jnp
from jax import Array

DROPPED, HIGH, LOW = 0, 1, 2  # tier codes: 0 is dropped, code t is stored tier t - 1


def mean_significance(total: Array, position: Array, observed: Array) -> Array:
    """`S / n`, `n` the queries that scored the token: those at or after its position in the spans `observed [B, spans, 2]` (end, length).

    `total`, `position [B, tokens]`.
    """
    position = position.astype(jnp.int32)
    scored_by = sum(jnp.clip(end[:, None] - position, 0, length[:, None]) for end, length in jnp.moveaxis(observed, 0, -1))
    return total / jnp.maximum(scored_by, 1).astype(jnp.float32)


def classify(mean: Array, tau: Array, tiers: int) -> Array:
    """Tier code of tokens of mean significance `mean [B, n]` under thresholds `tau [B, 2]` (high, low); strict comparisons."""
    below_high, below_low = mean < tau[:, :1], mean < tau[:, 1:]
    kept = jnp.where(below_high, LOW, HIGH) if tiers == 2 else jnp.full(mean.shape, HIGH)
    return jnp.where(below_low, DROPPED, kept)


def least_significant(mean: Array, position: Array, candidate: Array) -> Array:
    """Mask `[B, n]` of the candidate with the least mean in each row, the oldest of equals; none where a row has no candidate."""
    masked = jnp.where(candidate, mean, jnp.inf)
    least = candidate & (masked == masked.min(axis=-1, keepdims=True))
    age = jnp.where(least, position.astype(jnp.int32), jnp.iinfo(jnp.int32).max)
    return least & (age == age.min(axis=-1, keepdims=True))
