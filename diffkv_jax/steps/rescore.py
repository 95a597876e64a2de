"""What stages do with all scores of a layer before the policy decides: earlier queries forgotten
(`Score.resets`), tokens ranked anew (`Score.rescore`), those that go marked (`Keep.mark`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache, with_significance
from diffkv_jax.cache.layer import LayerView, unmerged_layout
from diffkv_jax.cache.token_class import classes_at
from diffkv_jax.pallas_kernels.apply_event import Tokens
from diffkv_jax.pallas_kernels.branch import when
from diffkv_jax.pallas_kernels.decode_attention.stream import (
    chunk_pages,
    chunk_tokens,
    num_chunks,
    over_chunks,
    read_chunk,
)
from diffkv_jax.pallas_kernels.pages import read_token_data, write_token_array
from diffkv_jax.policy.score import ScoreView, is_protected, scores_of
from diffkv_jax.steps.event import entered, recent_tokens
from diffkv_jax.steps.forget import owners


class Outside(NamedTuple):
    """Tokens of a layer's B heads in the recent window and the prompt chunk."""

    tokens: Tokens  # [B, n, ...]
    valid: Array  # bool [B, n]
    leaving: Array  # bool [B, n]


def reset_scores(cache: KVCache, requests: Array) -> KVCache:
    """The cache without what earlier queries gave (protected tokens stay so) to the tokens of the
    `requests` (bool [R]) that the policy is about to decide on.
    """
    if cache.policy.score is None or not cache.policy.score.resets:
        return cache

    def reset(scores: tuple[Array, Array]) -> tuple[Array, Array]:
        owner = owners(cache)
        theirs = (owner >= 0) & requests[jnp.maximum(owner, 0)]
        of_them = theirs[:, None, None], requests[None, :, None, None]
        stored, recent = (
            jnp.where(of & ~is_protected(x), 0.0, x) for of, x in zip(of_them, scores, strict=True)
        )
        return stored, recent

    before = cache.stored.pages.significance, cache.recent.significance
    stored, recent = when(requests.any(), reset, before)
    return with_significance(cache, stored, recent)


def rescore(
    cache: KVCache,
    view: LayerView,
    outside: Outside,
    seq_len: Array,
    *,
    decides: Array | None = None,
    chooses: Array | None = None,
) -> tuple[KVCache, Array]:
    """The cache with new scores of a layer's stored tokens, and those float32 [B, n] of the tokens
    outside of the pages.

    `seq_len` int32 [R] counts all tokens; nothing changes unless `decides` (bool []); `chooses`
    bool [R] is for `Keep.mark`.
    """
    policy, scores = cache.policy, outside.tokens.significance
    if not policy.rescores:
        return cache, scores
    heads = None if chooses is None else view.per_head(chooses)
    keep = jax.tree.map(view.take, policy.keep)
    score_state = jax.tree.map(view.take, cache.state.score)

    def change(given: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        significance, scores, state = given
        score_view, write = _score_view(cache, view, significance, scores, outside, seq_len)
        new = score_view.scores
        if policy.score is not None and policy.score.rescores:
            new = policy.score.rescore(score_state, score_view)
            new = scores_of(policy.score, "rescore", new, score_view.scores.shape)
            # a request from which nothing leaves is not decided on, whatever others of the batch do
            new = jnp.where(outside.leaving.any(axis=1)[:, None], new, score_view.scores)
        if keep.marks:
            state, new = keep.mark(state, dataclasses.replace(score_view, scores=new), heads)
            new = scores_of(keep, "mark", new, score_view.scores.shape)
        if not keep.protects:
            new = jnp.where(is_protected(score_view.scores), score_view.scores, new)
        inside = new.shape[1] - score_view.outside
        return write(significance, new), new[:, inside:], state

    state = jax.tree.map(view.take, cache.state.keep)
    given = cache.stored.pages.significance, scores, state
    significance, scores, state = change(given) if decides is None else when(decides, change, given)
    state = jax.tree.map(view.put, cache.state.keep, state)
    cache = dataclasses.replace(cache, state=cache.state._replace(keep=state))
    return with_significance(cache, significance), scores


def rescore_oldest(cache: KVCache, count: Array) -> KVCache:
    """`rescore` of every layer when the oldest `count` int32 [R] recent tokens of each request are
    to leave; what they score is in the window.
    """
    if not cache.policy.rescores:
        return cache

    def of_layer(layer: Array, cache: KVCache) -> KVCache:
        view = LayerView(cache.spec, layer)
        before, live = recent_tokens(cache, view)
        tokens = entered(cache, view, before, live)
        leaving = jnp.arange(live.shape[1]) < view.per_head(count)[:, None]
        outside = Outside(tokens, live, leaving)
        cache, scores = rescore(cache, view, outside, cache.counters.seq_len)
        window = view.put(
            cache.recent.significance, jnp.where(leaving, scores, before.significance)
        )
        return dataclasses.replace(cache, recent=cache.recent._replace(significance=window))

    return lax.fori_loop(0, cache.spec.unmerged_layers, of_layer, cache)


def unmark(cache: KVCache) -> KVCache:
    """The cache after an event: what was marked and is still there found no page."""
    keep = cache.policy.keep
    if not keep.marks:
        return cache
    stored = keep.unmark(cache.stored.pages.significance)
    return with_significance(cache, stored, keep.unmark(cache.recent.significance))


def _score_view(
    cache: KVCache,
    view: LayerView,
    significance: Array,
    scores: Array,
    outside: Outside,
    seq_len: Array,
) -> tuple[ScoreView, Callable[[Array, Array], Array]]:
    """The view of a layer's tokens, and what puts new scores of the stored ones into the pool's."""
    spec, stored = cache.spec.unmerged, view.stored(cache)
    layout, table = spec.layout, (stored.page_table, stored.tier_len)
    pages = dataclasses.replace(stored.pages, significance=significance)
    sides = [
        read_token_data(pages, layout, *table, tier, spec.max_len) for tier in range(layout.tiers)
    ]
    stored_score, position, live = (jnp.concatenate(x, axis=1) for x in zip(*sides, strict=True))
    at = jnp.concatenate([position.astype(jnp.int32), outside.tokens.position], axis=1)

    def write(significance: Array, values: Array) -> Array:
        first = 0
        for tier, (score, _, _) in enumerate(sides):
            part = values[:, first : first + score.shape[1]]
            length = stored.tier_len[:, tier]
            significance = write_token_array(
                significance, layout, stored.page_table, tier, length, part
            )
            first += score.shape[1]
        return significance

    scores = jnp.concatenate([stored_score, scores], axis=1)
    score_view = ScoreView(
        scores=scores,
        position=at,
        live=jnp.concatenate([live, outside.valid], axis=1),
        leaving=jnp.concatenate([live, outside.leaving], axis=1),
        protected=is_protected(scores),
        token_class=lambda: classes_at(cache, view, at),
        outside=outside.valid.shape[1],
        seq_len=view.per_head(seq_len),
        max_len=spec.max_len,
        over_tokens=lambda function: _over_tokens(cache, view, outside.tokens, function),
        attention=spec.attention,
        policy=cache.policy,
    )
    return score_view, write


def _over_tokens(cache: KVCache, view: LayerView, tokens: Tokens, function: Callable) -> Any:
    """`function(k, v)` of float32 [B, m, head_dim] keys and values as the model made them, arrays
    [B, ..., m], for all tokens of a layer in the order of `ScoreView`: some pages at a time.
    """
    spec, stored = cache.spec, view.stored(cache)
    layout, table = unmerged_layout(cache, view), (stored.page_table, stored.tier_len)
    put, parts = lax.dynamic_update_slice_in_dim, []

    def of_tokens(k: Array, v: Array) -> Any:
        return function(*view.untransformed(cache, k, v))

    for tier in range(layout.tiers):
        lanes = chunk_pages(layout, tier) * layout.tokens_per_page(tier)
        width = num_chunks(layout, tier, spec.max_len) * lanes
        capacity = layout.pages_for(tier, spec.max_len) * layout.tokens_per_page(tier)

        def of_chunk(i: Array, tier: int = tier):
            chunk = read_chunk(stored.pages, layout, tier, *table, i)
            return of_tokens(*chunk_tokens(chunk, layout, tier))

        def body(i: Array, found: Any, of_chunk=of_chunk, lanes: int = lanes) -> Any:
            new = of_chunk(i)
            return jax.tree.map(lambda all, x: put(all, x, i * lanes, axis=-1), found, new)

        shapes = jax.eval_shape(of_chunk, jnp.int32(0))
        empty = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], width), x.dtype), shapes)  # noqa: B023
        found = over_chunks(layout, tier, stored.tier_len, body, empty)
        parts.append(jax.tree.map(lambda x, capacity=capacity: x[..., :capacity], found))
    parts.append(of_tokens(tokens.k.astype(jnp.float32), tokens.v.astype(jnp.float32)))
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=-1), *parts)
