"""One prompt chunk of a paged layer: attend, score, and let the tokens that leave the recent window
into the tiers.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.admission import make_room
from diffkv_jax.cache.cache import CacheSpec, KVCache, Waiting
from diffkv_jax.cache.layer import (
    head_numbers,
    layer_clock,
    layer_heads,
    layer_layout,
    per_head,
    place_in_pair,
    put_layer,
    stored_layer,
    take_layer,
    unmerged_layout,
    with_stored,
)
from diffkv_jax.cache.query_counts import count_observed
from diffkv_jax.methods.expected_attention import count_queries, expected_attention, layer_queries
from diffkv_jax.methods.fastgen import choose_and_mark
from diffkv_jax.methods.kvzip_layer import score_replayed
from diffkv_jax.methods.pyramidinfer import note_dropped, present_rows, put_back, take_rows
from diffkv_jax.methods.snapkv import average_heads, smooth
from diffkv_jax.pallas_kernels.apply_event import Tokens, ranked
from diffkv_jax.pallas_kernels.branch import when
from diffkv_jax.pallas_kernels.decode_attention import Heads
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.pallas_kernels.plan_event import DROPPED
from diffkv_jax.pallas_kernels.prefill_attention import (
    Chunk,
    ColumnSums,
    Scale,
    column_sums,
    prefill_attention,
)
from diffkv_jax.policy.protect import protected_tokens
from diffkv_jax.policy.selection import ranked_tokens
from diffkv_jax.steps.event import apply_plan, plan_event
from diffkv_jax.steps.pairs import merge_pair, pages_needed
from diffkv_jax.steps.step import PrefillStep, ReplayStep

PAGES_A_ROUND = 8  # after a prompt most tokens change tier


def prefill_layer(
    cache: KVCache, layer: Array, q: Array, k: Array, v: Array, step: PrefillStep | ReplayStep
) -> tuple[Array, KVCache]:
    """`q [R, C, num_q_heads, d]`, `k`, `v [R, C, num_kv_heads, d]` to the output and the cache;
    `layer` counts paged layers.

    K and V of the chunk exist exactly for this one layer only: they are in pages and window when it
    returns, or nowhere (`ReplayStep`).
    """
    spec = cache.spec
    heads = layer_heads(cache, layer, cache.recent_len)
    rows, present = present_rows(cache, q.shape[1], step.length)
    q, k, v = (take_rows(cache, x, rows) for x in (q, k, v))
    chunk = _by_head(cache, q, k, v, present)
    scale = Scale(spec.attention.sm_scale, spec.attention.logits_soft_cap)
    layout = layer_layout(cache, layer)
    out, lse = prefill_attention(chunk, cache.pages, layout, heads, scale, kernels=spec.kernels)
    # [R, C, Hq, d]
    out = jnp.moveaxis(out.reshape(*_grouped(spec), *out.shape[2:]), 3, 1).reshape(
        *q.shape[:-1], -1
    )
    if isinstance(step, ReplayStep):
        return out.astype(q.dtype), score_replayed(cache, layout, chunk, heads, scale, step)
    sums = _scores(cache, layout, chunk, lse, heads, scale, step)
    pages = dataclasses.replace(cache.pages, significance=sums.pages)
    cache = count_queries(dataclasses.replace(cache, pages=pages), layer, chunk)
    gathered = _gather(cache, layer, chunk, heads, sums, rows - (q.shape[1] - step.length[:, None]))
    # always so, but the compiler cannot know: the event waits for attention's reads of the pool
    attended = lse[0, 0, 0] > -jnp.inf
    alone = attended if spec.merge is None else attended & (layer < spec.unmerged_layers)
    cache = when(alone, lambda cache: _store(cache, layer, gathered, step, rows), cache)
    if spec.merge is not None:
        second = (layer >= spec.unmerged_layers) & (place_in_pair(spec, layer) == 1)
        cache = when(
            attended & second, lambda cache: _store_pair(cache, layer, gathered, step), cache
        )
        cache = dataclasses.replace(
            cache, waiting=Waiting(*(x.astype(spec.dtype) for x in gathered.tokens[:2]))
        )
    cache = _keep_window(cache, layer, gathered, step)
    return put_back(cache, out, rows).astype(q.dtype), cache


def observing_rows(spec: CacheSpec, chunk_len: int) -> int:
    """Rows of a chunk of `chunk_len` that score when it is the last one."""
    return (
        chunk_len
        if spec.selection.observe == "all"
        else min(int(spec.selection.observe or 0), chunk_len)
    )


class _Gathered(NamedTuple):
    """Recent window and chunk side by side, n = window + flush + C."""

    tokens: Tokens  # [B, n, ...]
    valid: Array  # bool [B, n]


def _grouped(spec: CacheSpec) -> tuple[int, int, int]:
    attention = spec.attention
    return (
        spec.num_requests,
        attention.num_kv_heads,
        attention.num_q_heads // attention.num_kv_heads,
    )


def _by_head(cache: KVCache, q: Array, k: Array, v: Array, length: Array) -> Chunk:
    """Requests and KV heads flattened, K and V rounded to the cache dtype; all in the model's
    dtype.
    """
    spec = cache.spec
    requests, kv_heads, group = _grouped(spec)
    chunk_len, d = q.shape[1], q.shape[3]
    q = jnp.moveaxis(q.reshape(requests, chunk_len, kv_heads, group, d), 1, 3).reshape(
        -1, group, chunk_len, d
    )
    k, v = (
        jnp.moveaxis(x, 1, 2)
        .reshape(spec.num_heads, chunk_len, x.shape[-1])
        .astype(spec.dtype)
        .astype(q.dtype)
        for x in (k, v)
    )
    padding = jnp.arange(chunk_len) < chunk_len - per_head(cache, length)[:, None]
    k, v = (jnp.where(padding[..., None], 0, x) for x in (k, v))
    return Chunk(q, k, v, per_head(cache, length))


def _scores(
    cache: KVCache,
    layout: PageLayout,
    chunk: Chunk,
    lse: Array,
    heads: Heads,
    scale: Scale,
    step: PrefillStep,
) -> ColumnSums:
    """Column sums of the observing rows when `step.compress`, with "all" also of every earlier
    chunk; else unchanged and zeros.
    """
    spec = cache.spec
    silent = ColumnSums(
        cache.pages.significance,
        jnp.zeros(heads.recent_k.shape[1:3], jnp.float32),
        jnp.zeros(chunk.k.shape[:2], jnp.float32),
    )
    if not spec.selection.by_attention:
        return silent
    rows = observing_rows(spec, chunk.k.shape[1])
    # exp(logit - (lse - log weight)) is the weighted probability
    if spec.selection.newest_weight != 1:
        lse = lse - jnp.log(_weights(spec.selection.newest_weight, rows, chunk))[:, None]

    def score(sums: ColumnSums) -> ColumnSums:
        pages = dataclasses.replace(cache.pages, significance=sums.pages)
        return column_sums(chunk, lse, rows, pages, layout, heads, scale, kernels=spec.kernels)

    return when(step.compress | (spec.selection.observe == "all"), score, silent)


def _weights(newest: float, rows: int, chunk: Chunk) -> Array:
    """What each row of the chunk counts, float32 [B, C]: 1 for the first observing one, linearly to
    `newest` for the last.
    """
    counted = jnp.minimum(rows, chunk.length)[:, None]
    index = jnp.arange(chunk.k.shape[1]) - (chunk.k.shape[1] - counted)
    return 1 + (newest - 1) * jnp.maximum(index, 0) / jnp.maximum(counted - 1, 1)


def _gather(
    cache: KVCache, layer: Array, chunk: Chunk, heads: Heads, sums: ColumnSums, place: Array
) -> _Gathered:
    """The recent tokens and the chunk's in one row a head, with significance and positions.

    `place` int32 [R, C] counts the chunk's tokens from its first one, negative where it is padded.
    """
    (recent_k, recent_v, live), chunk_len = heads.recent(), chunk.k.shape[1]
    slots = live.shape[1]
    start = per_head(cache, cache.seq_len)[:, None]  # position of the chunk's first token
    recent_position = start - heads.recent_len[:, None] + jnp.arange(slots)
    first = chunk_len - chunk.length[:, None]
    chunk_position = start + per_head(cache, place)
    recent_score = sums.recent + (
        take_layer(cache.recent_significance, layer) if cache.spec.layout.scored else 0
    )
    tokens = Tokens(
        k=jnp.concatenate([recent_k, chunk.k.astype(jnp.float32)], axis=1),
        v=jnp.concatenate([recent_v, chunk.v.astype(jnp.float32)], axis=1),
        significance=jnp.concatenate([recent_score, sums.chunk], axis=1),
        position=jnp.concatenate([recent_position, chunk_position], axis=1),
    )
    valid = jnp.concatenate([live, jnp.arange(chunk_len) >= first], axis=1)
    return _Gathered(tokens, valid)


def _store(
    cache: KVCache, layer: Array, gathered: _Gathered, step: PrefillStep, rows: Array
) -> KVCache:
    """Let everything but the last tokens (`CacheSpec.staying`) into the tiers; a request without
    tokens in this chunk stays as it is.

    `rows` int32 [R, C] are those of `present_rows`.
    """
    spec = cache.spec.unmerged
    tokens, valid = gathered
    seq_len = cache.seq_len + step.length
    observed = observed_after(cache, step, tokens.k.shape[1] - spec.window - spec.flush)
    clock = layer_clock(cache, layer, seq_len, observed, recent_after(cache, step), step.compress)
    leaving = _leaving(cache, gathered, step)
    protected = protected_tokens(cache, tokens.position)
    held, position = stored_layer(cache, layer), tokens.position
    if spec.selection.score == "expected":
        layout, queries, outside = (
            unmerged_layout(cache, layer),
            layer_queries(cache, layer),
            tokens,
        )
        cache, tokens = _rescored(
            cache,
            tokens,
            step,
            lambda scores: expected_attention(
                spec, layout, held, queries, clock.seq_len, scores[0], outside, valid
            ),
        )
    if spec.selection.shared:
        cache, tokens = _rescored(
            cache, tokens, step, lambda scores: average_heads(spec, held, *scores)
        )
    if spec.selection.pooling > 1:
        counted = leaving if protected is None else leaving & ~protected
        cache, tokens = _rescored(
            cache, tokens, step, lambda scores: smooth(spec, held, *scores, position, counted)
        )
    if spec.selection.profiled:

        def choose(state: tuple[KVCache, Array]) -> tuple[KVCache, Array]:
            return choose_and_mark(
                state[0], layer, state[1], tokens.position, valid, leaving, step.length
            )

        cache, scores = when(step.compress, choose, (cache, tokens.significance))
        tokens = tokens._replace(significance=scores)
    tokens = ranked_tokens(
        spec.selection, tokens, valid, head_numbers(cache, layer), protected, spec.attention.latent
    )
    plan = plan_event(
        spec,
        stored_layer(cache, layer),
        clock,
        tokens.significance,
        tokens.position,
        leaving,
        one_victim=False,
    )
    dropped = leaving & (plan.entering == DROPPED)
    cache = note_dropped(cache, rows, dropped[:: spec.attention.num_kv_heads, -rows.shape[1] :])
    cache = make_room(cache, plan.pages.reshape(spec.num_requests, -1).sum(axis=1))
    admitted = per_head(cache, ~cache.overflow)
    held, layout = stored_layer(cache, layer), unmerged_layout(cache, layer)
    stored = apply_plan(
        spec, layout, held, plan, tokens, admitted, one_victim=False, pages_a_round=PAGES_A_ROUND
    )
    return with_stored(cache, layer, stored)


def _rescored(
    cache: KVCache,
    tokens: Tokens,
    step: PrefillStep,
    change: Callable[[tuple[Array, Array]], tuple[Array, Array]],
) -> tuple[KVCache, Tokens]:
    """Where the policy decides, the scores in the pool and those of `tokens` changed."""
    significance, entering = when(
        step.compress, change, (cache.pages.significance, tokens.significance)
    )
    pages = dataclasses.replace(cache.pages, significance=significance)
    return dataclasses.replace(cache, pages=pages), tokens._replace(significance=entering)


def _store_pair(cache: KVCache, layer: Array, gathered: _Gathered, step: PrefillStep) -> KVCache:
    """Let everything but the last `window` tokens of a layer, and of the one before that it is
    merged with, into their tiers.
    """
    spec, tokens, waiting = cache.spec, gathered.tokens, cache.waiting
    assert waiting is not None  # `before_prefill` has made room
    leaving = _leaving(cache, gathered, step)
    needed = pages_needed(spec, take_layer(cache.tier_len, layer), leaving.sum(axis=1))
    cache = make_room(cache, needed.reshape(spec.num_requests, -1).sum(axis=1))
    first = tokens._replace(k=waiting.k, v=waiting.v)
    return merge_pair(
        cache, layer, first, tokens, leaving & per_head(cache, ~cache.overflow)[:, None]
    )


def _leaving(cache: KVCache, gathered: _Gathered, step: PrefillStep) -> Array:
    """All but the last tokens (`CacheSpec.staying`), bool [B, n]; none of a request without tokens
    in this chunk, or without pages.
    """
    stay_from = per_head(cache, cache.seq_len + step.length - recent_after(cache, step))[:, None]
    going = per_head(cache, (step.length > 0) & ~cache.overflow)[:, None]
    return gathered.valid & (gathered.tokens.position < stay_from) & going


def observed_after(cache: KVCache, step: PrefillStep, chunk_len: int) -> Array:
    """`observed` once this chunk has scored."""
    spec = cache.spec
    scoring = jnp.minimum(step.length, observing_rows(spec, chunk_len))
    rows = jnp.where(step.compress | (spec.selection.observe == "all"), scoring, 0)
    return count_observed(cache.observed, rows, cache.seq_len + step.length)


def recent_after(cache: KVCache, step: PrefillStep) -> Array:
    """`recent_len` int32 [R] after this chunk."""
    return jnp.where(
        step.length > 0, cache.spec.staying(cache.recent_len + step.length), cache.recent_len
    )


def _keep_window(cache: KVCache, layer: Array, gathered: _Gathered, step: PrefillStep) -> KVCache:
    """The last tokens of `gathered`, oldest first, become the recent window of a layer."""
    spec = cache.spec
    total = gathered.valid.sum(axis=1)[:, None]
    kept = per_head(cache, recent_after(cache, step))[:, None]
    rank = total - kept + jnp.arange(spec.window + spec.flush)
    index = jnp.minimum(
        ranked(jnp.cumsum(gathered.valid, axis=1), rank), gathered.valid.shape[1] - 1
    )
    tokens = gathered.tokens
    k, v = (jnp.take_along_axis(x, index[..., None], axis=1) for x in (tokens.k, tokens.v))
    cache = dataclasses.replace(
        cache,
        recent_k=put_layer(cache.recent_k, layer, k),
        recent_v=put_layer(cache.recent_v, layer, v),
    )
    if spec.layout.scored:
        live = jnp.arange(index.shape[1]) < kept
        scores = jnp.where(live, jnp.take_along_axis(tokens.significance, index, axis=1), 0)
        cache = dataclasses.replace(
            cache, recent_significance=put_layer(cache.recent_significance, layer, scores)
        )
    return cache
