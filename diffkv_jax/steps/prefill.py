"""One prompt chunk of a paged layer: attend, score, and let tokens into the tiers."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import KVCache, Waiting, with_significance
from diffkv_jax.cache.layer import LayerView, layer_heads, layer_layout, place_in_pair
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.pallas_kernels.branch import when
from diffkv_jax.pallas_kernels.decode_attention import Heads
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.pallas_kernels.prefill_attention import (
    Chunk,
    ColumnSums,
    Scale,
    column_sums,
    prefill_attention,
)
from diffkv_jax.policy.score import PassLayer, PromptQueries, Score
from diffkv_jax.policy.stage import overrides
from diffkv_jax.steps.hidden_rows import present_rows, put_back, take_rows
from diffkv_jax.steps.step import PrefillStep, ScoreStep
from diffkv_jax.steps.store_chunk import gather, keep_window, scoring_rows, store, store_pair


def prefill_layer(
    cache: KVCache, layer: Array, q: Array, k: Array, v: Array, step: PrefillStep | ScoreStep
) -> tuple[Array, KVCache]:
    """`q [R, C, num_q_heads, d]`, `k`, `v [R, C, num_kv_heads, d]` to the output and the cache;
    `layer` counts paged layers.

    K and V of the chunk exist exactly for this one layer only: they are in pages and window when it
    returns, or nowhere (`ScoreStep`).
    """
    spec, view = cache.spec, LayerView(cache.spec, layer)
    heads = layer_heads(cache, view, cache.counters.recent_len)
    rows, present = present_rows(cache, q.shape[1], step.length)
    q, k, v = (take_rows(cache, x, rows) for x in (q, k, v))
    chunk = _by_head(view, q, k, v, present)
    scale = Scale(spec.attention.sm_scale, spec.attention.logits_soft_cap)
    layout = layer_layout(cache, view)
    out, lse = prefill_attention(
        chunk, cache.stored.pages, layout, heads, scale, kernels=spec.kernels
    )
    out = jnp.moveaxis(out.reshape(*_grouped(spec), *out.shape[2:]), 3, 1)
    out = out.reshape(*q.shape[:-1], -1)  # [R, C, Hq, d]
    if isinstance(step, ScoreStep):
        return out.astype(q.dtype), _score_pass(cache, view, layout, chunk, heads, scale, step)
    sums = _scores(cache, layout, chunk, lse, heads, scale, step)
    cache = _on_prompt(with_significance(cache, sums.pages), view, chunk)
    place = rows - (q.shape[1] - step.length[:, None])
    gathered = gather(cache, view, chunk, heads, sums, place)
    # always so, but the compiler cannot know: the event waits for attention's reads of the pool
    attended = lse[0, 0, 0] > -jnp.inf
    alone = attended if spec.pairs is None else attended & (layer < spec.unmerged_layers)
    cache = when(alone, lambda cache: store(cache, view, gathered, step, rows), cache)
    if spec.pairs is not None:
        second = (layer >= spec.unmerged_layers) & (place_in_pair(spec, layer) == 1)
        enter = attended & second
        cache = when(enter, lambda cache: store_pair(cache, view, gathered, step), cache)
        waiting = Waiting(*(x.astype(spec.dtype) for x in gathered.tokens[:2]))
        cache = dataclasses.replace(cache, in_chunk=cache.in_chunk._replace(waiting=waiting))
    cache = keep_window(cache, view, gathered, step)
    return put_back(cache, out, rows).astype(q.dtype), cache


def _grouped(spec: CacheSpec) -> tuple[int, int, int]:
    kv_heads = spec.attention.num_kv_heads
    return spec.num_requests, kv_heads, spec.attention.num_q_heads // kv_heads


def _by_head(view: LayerView, q: Array, k: Array, v: Array, length: Array) -> Chunk:
    """Requests and KV heads flattened, K and V rounded to the cache dtype; all in the model's
    dtype.
    """
    spec = view.spec
    requests, kv_heads, group = _grouped(spec)
    chunk_len, d = q.shape[1], q.shape[3]
    q = jnp.moveaxis(q.reshape(requests, chunk_len, kv_heads, group, d), 1, 3)
    q = q.reshape(-1, group, chunk_len, d)
    length = view.per_head(length)
    padding = jnp.arange(chunk_len) < chunk_len - length[:, None]

    def flat(x: Array) -> Array:
        x = jnp.moveaxis(x, 1, 2).reshape(spec.num_heads, chunk_len, x.shape[-1])
        return jnp.where(padding[..., None], 0, x.astype(spec.dtype).astype(q.dtype))

    return Chunk(q, flat(k), flat(v), length)


def _scores(
    cache: KVCache,
    layout: PageLayout,
    chunk: Chunk,
    lse: Array,
    heads: Heads,
    scale: Scale,
    step: PrefillStep,
) -> ColumnSums:
    """Column sums of the scoring rows when `step.compress`, with "all" also of every earlier chunk;
    else unchanged and zeros.
    """
    score, significance = cache.policy.score, cache.stored.pages.significance
    recent = jnp.zeros(heads.recent_k.shape[1:3], jnp.float32)
    silent = ColumnSums(significance, recent, jnp.zeros(chunk.k.shape[:2], jnp.float32))
    if score is None or not score.queries:
        return silent
    rows = scoring_rows(cache, chunk.k.shape[1])
    if overrides(score, "query_weights", Score):
        # exp(logit - (lse - log weight)) is the weighted probability
        lse = lse - jnp.log(_weights(score, rows, chunk))[:, None]

    def sum_up(sums: ColumnSums) -> ColumnSums:
        pages = dataclasses.replace(cache.stored.pages, significance=sums.pages)
        kernels = cache.spec.kernels
        return column_sums(chunk, lse, rows, pages, layout, heads, scale, kernels=kernels)

    return when(step.compress | (score.queries == "all"), sum_up, silent)


def _weights(score: Score, rows: int, chunk: Chunk) -> Array:
    """What each row of the chunk counts, float32 [B, C], the last `rows` of them score."""
    count = jnp.minimum(rows, chunk.length)[:, None]
    index = jnp.arange(chunk.k.shape[1]) - (chunk.k.shape[1] - count)
    return score.query_weights(jnp.maximum(index, 0), count)


def _on_prompt(cache: KVCache, view: LayerView, chunk: Chunk) -> KVCache:
    """The cache with what the score carries after the chunk's queries (`Score.on_prompt`)."""
    policy, attention, state = cache.policy, cache.spec.attention, cache.state.score
    if policy.score is None or not overrides(policy.score, "on_prompt", Score):
        return cache
    rows = jnp.arange(chunk.q.shape[2])
    seq_len = cache.counters.seq_len
    first = view.per_head(seq_len) - len(rows) + chunk.length
    transform = view.transform(cache, chunk.q.ndim)
    queries = PromptQueries(
        transform.queries(chunk.q.astype(jnp.float32), attention, back=True),
        first[:, None] + rows,
        rows >= len(rows) - chunk.length[:, None],
        view.per_head(seq_len == 0),  # also after a prompt that found no page
        attention,
        policy.protect.sinks,
    )
    after = policy.score.on_prompt(jax.tree.map(view.take, state), queries)
    state = jax.tree.map(view.put, state, after)
    return dataclasses.replace(cache, state=cache.state._replace(score=state))


def _score_pass(
    cache: KVCache,
    view: LayerView,
    layout: PageLayout,
    chunk: Chunk,
    heads: Heads,
    scale: Scale,
    step: ScoreStep,
) -> KVCache:
    """The cache with the scores of the tokens that a pass goes over; nothing else changes."""
    policy = cache.policy
    assert policy.score is not None  # it alone has passes
    seq_len, sinks = view.per_head(cache.counters.seq_len), policy.protect.sinks
    pages, max_len = cache.stored.pages, cache.spec.max_len
    of = PassLayer(chunk, pages, layout, heads, scale, seq_len, step.first, max_len, sinks)
    return with_significance(cache, policy.score.score_pass(of))
