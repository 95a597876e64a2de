"""Which queries have scored: per request a few spans of positions, so that every token's mean
divides by the queries that saw it.
"""

import jax.numpy as jnp
from jax import Array

# a prompt that scores only at its end opens a new span; beyond this many the two oldest are
# counted as one
SPANS = 8


def no_query_spans(num_requests: int) -> Array:
    """int32 [R, SPANS, 2], (end, length) of each span, oldest first; unused ones are (0, 0)."""
    return jnp.zeros((num_requests, SPANS, 2), jnp.int32)


def extend_query_spans(query_spans: Array, rows: Array, seq_len: Array) -> Array:
    """`query_spans` after the queries at positions `seq_len - rows` to `seq_len - 1` have scored;
    `rows`, `seq_len` int32 [R].
    """
    last = query_spans[:, -1]
    longer = query_spans.at[:, -1].set(jnp.stack([seq_len, last[:, 1] + rows], axis=-1))
    oldest = jnp.stack([query_spans[:, 1, 0], query_spans[:, 0, 1] + query_spans[:, 1, 1]], axis=-1)
    opened = jnp.concatenate(
        [oldest[:, None], query_spans[:, 2:], jnp.stack([seq_len, rows], axis=-1)[:, None]], axis=1
    )
    after = jnp.where((last[:, 0] == seq_len - rows)[:, None, None], longer, opened)
    return jnp.where((rows > 0)[:, None, None], after, query_spans)


def last_queries(query_spans: Array, count: Array) -> Array:
    """`query_spans` of the last `count` int32 [R] queries alone: a token that more have scored
    counts as scored by so many.
    """
    length = query_spans[..., 1]
    later = length.sum(axis=1, keepdims=True) - jnp.cumsum(length, axis=1)  # queries in later spans
    return query_spans.at[..., 1].set(jnp.clip(count[:, None] - later, 0, length))
