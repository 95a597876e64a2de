"""ExpectedAttention (arXiv:2510.00636): scores are the attention that queries like the prompt's
will give, times the value's norm.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import CacheSpec, KVCache
from diffkv_jax.cache.layer import per_head, put_layer, take_layer
from diffkv_jax.methods.query_statistics import QueryStatistics, with_queries
from diffkv_jax.pallas_kernels.apply_event import Stored, Tokens
from diffkv_jax.pallas_kernels.codecs.scales import length
from diffkv_jax.pallas_kernels.decode_attention.stream import (
    chunk_pages,
    chunk_tokens,
    num_chunks,
    over_chunks,
    read_chunk,
)
from diffkv_jax.pallas_kernels.pages import PageLayout, read_token_data, write_token_array
from diffkv_jax.pallas_kernels.prefill_attention import Chunk
from diffkv_jax.pallas_kernels.rope import at_positions, turn_pairs
from diffkv_jax.policy.selection import is_protected
from diffkv_jax.policy.transform import rotated


def count_queries(cache: KVCache, layer: Array, chunk: Chunk) -> KVCache:
    """The cache with a chunk's queries in the layer's statistics, where the policy asks for
    them.
    """
    spec = cache.spec
    if cache.queries is None:
        return cache
    assert spec.attention.rope is not None  # CacheSpec.build refuses
    rows = chunk.q.shape[2]
    position = (per_head(cache, cache.seq_len) - rows + chunk.length)[:, None] + jnp.arange(rows)
    counted = (jnp.arange(rows) >= rows - chunk.length[:, None]) & (
        position >= spec.selection.sinks
    )
    q = chunk.q.astype(jnp.float32)
    q = at_positions(
        rotated(q, back=True) if spec.rotate else q,
        position[:, None],
        spec.attention.rope,
        back=True,
    )
    before = layer_queries(cache, layer)
    fresh = per_head(cache, cache.seq_len == 0)  # also after a prompt that found no page
    after = with_queries(before._replace(seen=jnp.where(fresh, 0, before.seen)), q, counted)
    queries = QueryStatistics(
        *(put_layer(x, layer, new) for x, new in zip(cache.queries, after, strict=True))
    )
    return dataclasses.replace(cache, queries=queries)


def layer_queries(cache: KVCache, layer: Array) -> QueryStatistics:
    """The statistics of a layer, `[B, ...]`."""
    assert cache.queries is not None
    return QueryStatistics(*(take_layer(x, layer) for x in cache.queries))


def expected_attention(
    spec: CacheSpec,
    layout: PageLayout,
    stored: Stored,
    queries: QueryStatistics,
    seq_len: Array,
    significance: Array,
    tokens: Tokens,
    valid: Array,
) -> tuple[Array, Array]:
    """The scores of a layer's stored tokens and of those outside of the pages.

    A key's score is `(mean_j softmax_t(s k_t . mu_j + s^2 k_t . Sigma_j k_t / 2) + epsilon) |v_t|`
    over the query heads j of the group and all tokens t but the sinks, `s` the model's factor on
    logits: what a normally distributed query gives on average. A soft cap of the logits is left
    out. Plain XLA: it runs once a prompt.

    Args:
        layout, stored: the layer's pages, as attention reads them.
        queries: statistics of the layer's prompt queries `[B, ...]`.
        seq_len: int32 [B], position of the first query to come.
        significance: the pool's.
        tokens, valid: those in the recent window and the prompt chunk, `[B, n, ...]`.

    Returns:
        The pool's significance, in which protected tokens stay so, and float32 [B, n].
    """
    sinks = spec.selection.sinks
    mean, covariance = _queries_to_come(spec, queries, seq_len)
    # what is written below: read before
    pages = dataclasses.replace(stored.pages, significance=significance)
    exponents, norms, counted, before = [], [], [], []
    for tier in range(layout.tiers):
        score, position, live = read_token_data(
            pages, layout, stored.page_table, stored.tier_len, tier, spec.max_len
        )
        in_tier = _stored_exponents(spec, layout, stored, tier, mean, covariance)
        for parts, x in zip((exponents, norms), in_tier, strict=True):
            parts.append(x[..., : live.shape[1]])
        counted.append(live & (position >= sinks))
        before.append(score)
    exponents.append(_exponents(tokens.k, mean, covariance))
    norms.append(length(tokens.v.astype(jnp.float32))[..., 0])
    counted.append(valid & (tokens.position >= sinks))
    logits = jnp.where(
        jnp.concatenate(counted, axis=1)[:, None], jnp.concatenate(exponents, axis=2), -jnp.inf
    )
    scores = (
        jax.nn.softmax(logits, axis=-1).mean(axis=1) + spec.selection.epsilon
    ) * jnp.concatenate(norms, axis=1)
    first = 0
    for tier, score in enumerate(before):
        values = jnp.where(is_protected(score), score, scores[:, first : first + score.shape[1]])
        significance = write_token_array(
            significance, layout, stored.page_table, tier, stored.tier_len[:, tier], values
        )
        first += score.shape[1]
    return significance, scores[:, first:]


def _queries_to_come(
    spec: CacheSpec, queries: QueryStatistics, seq_len: Array
) -> tuple[Array, Array]:
    """Mean [B, G, d] and covariance [B, G, d, d] of queries, times the factor on logits.

    Turned by the rotary embedding averaged over the next `future` positions, and by the cache's
    rotation.
    """
    position = (seq_len[:, None] + jnp.arange(spec.selection.future)).astype(jnp.float32)
    angle = position[..., None] * jnp.asarray(spec.attention.rope, jnp.float32)
    # [B, 1, d / 2]
    cos, sin = jnp.cos(angle).mean(axis=1)[:, None], jnp.sin(angle).mean(axis=1)[:, None]

    def turn(x: Array, cos: Array, sin: Array) -> Array:
        x = turn_pairs(x, cos, sin)
        return rotated(x) if spec.rotate else x

    # symmetric: the other side likewise
    half = turn(queries.covariance, cos[:, None], sin[:, None])
    covariance = turn(jnp.swapaxes(half, -1, -2), cos[:, None], sin[:, None])
    scale = spec.attention.sm_scale
    return scale * turn(queries.mean, cos, sin), scale**2 * covariance


def _exponents(k: Array, mean: Array, covariance: Array) -> Array:
    """`k . mean + k . covariance k / 2`, [B, G, n], of `k [B, n, d]`."""
    exact = lax.Precision.HIGHEST
    spread = jnp.einsum("bnj,bgij->bgni", k, covariance, precision=exact)
    return jnp.einsum("bnd,bgd->bgn", k, mean, precision=exact) + 0.5 * jnp.einsum(
        "bgni,bni->bgn", spread, k, precision=exact
    )


def _stored_exponents(
    spec: CacheSpec, layout: PageLayout, stored: Stored, tier: int, mean: Array, covariance: Array
) -> tuple[Array, Array]:
    """The exponents [B, G, n] and the norms of the values [B, n] of a tier in slot order."""
    lanes = chunk_pages(layout, tier) * layout.tokens_per_page(tier)
    width = num_chunks(layout, tier, spec.max_len) * lanes

    def body(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        k, v = chunk_tokens(
            read_chunk(stored.pages, layout, tier, stored.page_table, stored.tier_len, i),
            layout,
            tier,
        )
        exponents, norms = _exponents(k, mean, covariance), length(v)[..., 0]
        put = lax.dynamic_update_slice_in_dim
        return put(state[0], exponents, i * lanes, axis=2), put(state[1], norms, i * lanes, axis=1)

    heads, group = mean.shape[:2]
    return over_chunks(
        layout,
        tier,
        stored.tier_len,
        body,
        (jnp.zeros((heads, group, width)), jnp.zeros((heads, width))),
    )
