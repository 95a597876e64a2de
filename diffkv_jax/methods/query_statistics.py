"""Mean and covariance of a prompt's queries without their rotary embedding, gathered chunk by
chunk.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.model import AttentionSpec


class QueryStatistics(NamedTuple):
    """Of every query head (K KV heads, G query heads each): all prompts of a request, without its
    sinks.
    """

    seen: Array  # float32 [L, R, K] queries counted
    mean: Array  # float32 [L, R, K, G, head_dim]
    covariance: Array  # float32 [L, R, K, G, head_dim, head_dim]


def no_queries(attention: AttentionSpec, layers: int, requests: int) -> QueryStatistics:
    """Nothing counted yet."""
    heads = (layers, requests, attention.num_kv_heads)
    channels = (attention.num_q_heads // attention.num_kv_heads, attention.head_dim)
    return QueryStatistics(
        jnp.zeros(heads),
        jnp.zeros((*heads, *channels)),
        jnp.zeros((*heads, *channels, attention.head_dim)),
    )


def with_queries(before: QueryStatistics, q: Array, counted: Array) -> QueryStatistics:
    """The statistics of one layer `[B, ...]` after the rows `counted` bool [B, C] of `q` float32
    [B, G, C, d].

    Two sets' covariances are joined with the outer product of their means' difference (Chan et al.
    1979): no difference of large sums.
    """
    rows = counted[:, None, :, None]
    count = counted.sum(axis=1).astype(jnp.float32)
    total = before.seen + count
    share = (count / jnp.maximum(total, 1))[:, None, None]  # of the new rows
    each = jnp.maximum(count, 1)[:, None, None]
    mean = jnp.where(rows, q, 0).sum(axis=2) / each
    centred = jnp.where(rows, q - mean[:, :, None], 0)
    covariance = (
        jnp.einsum("bgci,bgcj->bgij", centred, centred, precision=lax.Precision.HIGHEST)
        / each[..., None]
    )
    apart = mean - before.mean
    between = share[..., None] * (1 - share[..., None]) * apart[..., :, None] * apart[..., None, :]
    joined = before.covariance + share[..., None] * (covariance - before.covariance) + between
    return QueryStatistics(total, before.mean + share * apart, joined)
