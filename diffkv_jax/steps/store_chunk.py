"""What leaves the recent window of a layer after a prompt chunk goes into the tiers."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.admission import make_room
from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import LayerView, layer_clock
from diffkv_jax.cache.pair_pages import pages_needed
from diffkv_jax.cache.query_counts import extend_query_spans
from diffkv_jax.pallas_kernels.apply_event import Tokens, ranked
from diffkv_jax.pallas_kernels.decode_attention import Heads
from diffkv_jax.pallas_kernels.plan_event import DROPPED
from diffkv_jax.pallas_kernels.prefill_attention import Chunk, ColumnSums
from diffkv_jax.steps.event import apply_plan, entered, plan_event
from diffkv_jax.steps.hidden_rows import note_dropped
from diffkv_jax.steps.pairs import merge_pair
from diffkv_jax.steps.rescore import Outside, rescore
from diffkv_jax.steps.step import PrefillStep

PAGES_A_ROUND = 8  # after a prompt most tokens change tier


class Gathered(NamedTuple):
    """Recent window and chunk side by side, n = window + flush + C."""

    tokens: Tokens  # [B, n, ...]
    valid: Array  # bool [B, n]


def gather(
    cache: KVCache, view: LayerView, chunk: Chunk, heads: Heads, sums: ColumnSums, place: Array
) -> Gathered:
    """The recent tokens and the chunk's in one row a head, with significance and positions.

    `place` int32 [R, C] counts the chunk's tokens from its first one, negative where it is padded.
    """
    (recent_k, recent_v, live), chunk_len = heads.recent(), chunk.k.shape[1]
    slots = live.shape[1]
    start = view.per_head(cache.counters.seq_len)[:, None]  # position of the chunk's first token
    recent_position = start - heads.recent_len[:, None] + jnp.arange(slots)
    first = chunk_len - chunk.length[:, None]
    chunk_position = start + view.per_head(place)
    scored = cache.spec.layout.scored
    recent_score = sums.recent + (view.take(cache.recent.significance) if scored else 0)
    tokens = Tokens(
        k=jnp.concatenate([recent_k, chunk.k.astype(jnp.float32)], axis=1),
        v=jnp.concatenate([recent_v, chunk.v.astype(jnp.float32)], axis=1),
        significance=jnp.concatenate([recent_score, sums.chunk], axis=1),
        position=jnp.concatenate([recent_position, chunk_position], axis=1),
    )
    valid = jnp.concatenate([live, jnp.arange(chunk_len) >= first], axis=1)
    return Gathered(tokens, valid)


def store(
    cache: KVCache, view: LayerView, gathered: Gathered, step: PrefillStep, rows: Array
) -> KVCache:
    """Let everything but the last tokens (`CacheSpec.num_unquantized`) into the tiers; a request
    without tokens in this chunk stays as it is.

    `rows` int32 [R, C] are those of `present_rows`.
    """
    spec, (tokens, valid) = cache.spec, gathered
    seq_len, chunk_len = cache.counters.seq_len + step.length, rows.shape[1]
    query_spans, exact = query_spans_after(cache, step, chunk_len), recent_after(cache, step)
    clock = layer_clock(cache, view, seq_len, query_spans, exact, step.compress)
    leaving = _leaving(cache, view, gathered, step)
    tokens = entered(cache, view, tokens, valid)
    cache, scores = rescore(
        cache,
        view,
        Outside(tokens, valid, leaving),
        seq_len,
        decides=step.compress,
        chooses=step.length > 0,
    )
    tokens = tokens._replace(significance=scores)
    plan = plan_event(cache, view, clock, tokens, leaving)
    dropped = leaving & (plan.entering == DROPPED)
    cache = note_dropped(cache, rows, dropped[:: spec.attention.num_kv_heads, -chunk_len:])
    cache = make_room(cache, view.by_request(plan.pages))
    admitted = view.per_head(~cache.counters.overflow)
    return apply_plan(cache, view, plan, tokens, admitted, pages_a_round=PAGES_A_ROUND)


def store_pair(cache: KVCache, view: LayerView, gathered: Gathered, step: PrefillStep) -> KVCache:
    """Let everything but the last `window` tokens of a layer, and of the one before that it is
    merged with, into their tiers.
    """
    spec, tokens, waiting = cache.spec, gathered.tokens, cache.in_chunk.waiting
    assert waiting is not None  # `before_prefill` has made room
    leaving = _leaving(cache, view, gathered, step)
    needed = pages_needed(spec, view.take(cache.stored.tier_len), leaving.sum(axis=1))
    cache = make_room(cache, view.by_request(needed))
    first = tokens._replace(k=waiting.k, v=waiting.v)
    leaving &= view.per_head(~cache.counters.overflow)[:, None]
    return merge_pair(cache, view, first, tokens, leaving)


def _leaving(cache: KVCache, view: LayerView, gathered: Gathered, step: PrefillStep) -> Array:
    """All but the last tokens (`CacheSpec.num_unquantized`), bool [B, n]; none of a request without
    tokens in this chunk, or without pages.
    """
    now = cache.counters
    stay_from = view.per_head(now.seq_len + step.length - recent_after(cache, step))[:, None]
    going = view.per_head((step.length > 0) & ~now.overflow)[:, None]
    return gathered.valid & (gathered.tokens.position < stay_from) & going


def query_spans_after(cache: KVCache, step: PrefillStep, chunk_len: int) -> Array:
    """`query_spans` once this chunk has scored."""
    now, every = cache.counters, cache.policy.queries == "all"
    rows = jnp.where(step.compress | every, scoring_queries(cache, step, chunk_len), 0)
    return extend_query_spans(now.query_spans, rows, now.seq_len + step.length)


def scoring_queries(cache: KVCache, step: PrefillStep, chunk_len: int) -> Array:
    """Queries int32 [R] of each request that score in this chunk, if it decides."""
    return jnp.minimum(step.length, scoring_rows(cache, chunk_len))


def scoring_rows(cache: KVCache, chunk_len: int) -> int:
    """Rows of a chunk of `chunk_len` that score when it is the last one."""
    queries = cache.policy.queries
    return chunk_len if queries == "all" else min(queries, chunk_len)


def recent_after(cache: KVCache, step: PrefillStep) -> Array:
    """`recent_len` int32 [R] after this chunk."""
    stays = cache.spec.num_unquantized(cache.counters.recent_len + step.length)
    return jnp.where(step.length > 0, stays, cache.counters.recent_len)


def keep_window(cache: KVCache, view: LayerView, gathered: Gathered, step: PrefillStep) -> KVCache:
    """The last tokens of `gathered`, oldest first, become the recent window of a layer."""
    spec, tokens = cache.spec, gathered.tokens
    total = gathered.valid.sum(axis=1)[:, None]
    kept = view.per_head(recent_after(cache, step))[:, None]
    rank = total - kept + jnp.arange(spec.window + spec.flush)
    index = ranked(jnp.cumsum(gathered.valid, axis=1), rank)
    index = jnp.minimum(index, gathered.valid.shape[1] - 1)
    k, v = (jnp.take_along_axis(x, index[..., None], axis=1) for x in (tokens.k, tokens.v))
    recent = cache.recent._replace(k=view.put(cache.recent.k, k), v=view.put(cache.recent.v, v))
    if spec.layout.scored:
        live = jnp.arange(index.shape[1]) < kept
        scores = jnp.where(live, jnp.take_along_axis(tokens.significance, index, axis=1), 0)
        recent = recent._replace(significance=view.put(recent.significance, scores))
    return dataclasses.replace(cache, recent=recent)
