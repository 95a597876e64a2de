"""The compression event of a layer, or of all: which tokens change tier, how many pages that takes,
and the change itself (docs/design.md 1). Decode, prompts and `Score.passes` end in it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import Clock, LayerView, unmerged_layout
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.cache.token_class import protected_tokens
from diffkv_jax.pallas_kernels.apply_event import Stored, Tokens, apply_event, pages_beyond
from diffkv_jax.pallas_kernels.pages import PageLayout, read_token_data
from diffkv_jax.pallas_kernels.plan_event import (
    DROPPED,
    Moves,
    Rule,
    classify,
    count_moves,
    mean_significance,
)
from diffkv_jax.policy.keep import KeepView, lines_of
from diffkv_jax.policy.ranking import ALL, in_whole_blocks
from diffkv_jax.policy.score import PROTECTED, LeavingTokens, Score, scores_of
from diffkv_jax.policy.stage import overrides


class Plan(NamedTuple):
    """What an event does to `B` heads."""

    # int32 [B, n] tier code of each token that leaves the recent window; DROPPED where there is
    # none
    entering: Array
    rule: Rule  # which stored tokens leave their tier
    moves: Moves  # how many do
    pages: Array  # int32 [B] pages that the head needs beyond what it has


def recent_tokens(cache: KVCache, view: LayerView) -> tuple[Tokens, Array]:
    """The tokens [B, window + flush, ...] in a layer's recent window, oldest first, and which
    slots hold one, bool [B, window + flush].
    """
    now = cache.counters
    k, v = view.take(cache.recent.k), view.take(cache.recent.v)
    if cache.spec.layout.scored:
        significance = view.take(cache.recent.significance)
    else:
        significance = jnp.zeros(k.shape[:2], jnp.float32)
    first, count = (
        view.per_head(x)[:, None] for x in (now.seq_len - now.recent_len, now.recent_len)
    )
    slot = jnp.arange(k.shape[1])
    return Tokens(k, v, significance, first + slot), slot < count


def entered(cache: KVCache, view: LayerView, tokens: Tokens, valid: Array) -> Tokens:
    """`tokens` [B, n, ...] of a layer's recent window and chunk with the scores that they enter the
    tiers with; `valid` bool [B, n].
    """
    score, head = cache.policy.score, view.head_numbers()
    scores = tokens.significance
    if score is not None and overrides(score, "enter", Score):
        k, v = view.untransformed(cache, tokens.k, tokens.v)
        leaving = LeavingTokens(k, v, *tokens[2:], valid, head, cache.spec.attention)
        scores = scores_of(score, "enter", score.enter(leaving), valid.shape)
        scores = jnp.clip(scores, ALL, PROTECTED / 4)  # one of -inf would go before it is decided
    protected = protected_tokens(cache, view, tokens.position)
    if protected is not None:
        scores = jnp.where(protected, PROTECTED, scores)
    return tokens._replace(significance=scores)


def one_victim(cache: KVCache) -> bool:
    """Whether an event in decode re-examines one token at most (Algorithm 1 of the DiffKV paper):
    the least significant one of the tier that the entering token joins.
    """
    return cache.spec.flush == 1 and not cache.policy.keep.ranks and not cache.policy.keep.marks


def plan_event(
    cache: KVCache,
    view: LayerView,
    clock: Clock,
    tokens: Tokens,
    leaving: Array,
    *,
    one_victim: bool = False,
) -> Plan:
    """Classify the tokens `leaving` (bool [B, n]) the window of a layer, the first n of `tokens`,
    and the stored ones. Heads from which nothing leaves are left alone.
    """
    spec, stored, n = cache.spec.unmerged, view.stored(cache), leaving.shape[1]
    scores, position = tokens.significance[:, :n], tokens.position[:, :n]
    layout, mean = spec.layout, mean_significance(scores, position, clock.query_spans)
    tau = _thresholds(spec, stored, clock, mean, leaving)
    entering = jnp.where(leaving, classify(mean, tau, layout.tiers), DROPPED)
    if layout.tokens_per_group > 1 and cache.policy.score is not None:
        whole = in_whole_blocks(entering != DROPPED, leaving, mean, layout.tokens_per_group)
        entering = whole.astype(entering.dtype)  # tier code 1
    return planned(spec, stored, clock.query_spans, tau, entering, leaving.any(axis=-1), one_victim)


def planned(
    spec: CacheSpec,
    stored: Stored,
    query_spans: Array,
    tau: Array,
    entering: Array,
    changes: Array,
    one_victim: bool = False,
) -> Plan:
    """The plan of thresholds `tau` float32 [B, 2] and `entering` tokens, for heads that something
    `changes` (bool [B]).
    """
    layout, table = spec.layout, (stored.page_table, stored.tier_len)
    receives = [(entering == tier + 1).any(axis=-1) for tier in range(layout.tiers)]
    rule = Rule(tau, query_spans, changes, jnp.stack(receives, axis=-1))
    how = {"one_victim": one_victim, "max_len": spec.max_len, "kernels": spec.kernels}
    moves = count_moves(stored.pages, layout, *table, rule, **how)
    return Plan(entering, rule, moves, pages_beyond(layout, stored.tier_len, entering, moves))


def _thresholds(
    spec: CacheSpec, stored: Stored, clock: Clock, mean: Array, leaving: Array
) -> Array:
    """Mean scores float32 [B, 2] below which a token is not high, and is dropped."""
    keep, tiers, kv_heads = clock.keep, spec.layout.tiers, spec.attention.num_kv_heads
    if not keep.ranks:
        none = jnp.zeros((len(mean), 0))
        keep_view = KeepView(none, none.astype(bool), clock.seq_len, clock.exact, tiers, kv_heads)
        return jnp.where(clock.decides, lines_of(keep, keep_view), ALL)

    def layer_thresholds(heads: tuple) -> Array:
        keep, page_table, tier_len, query_spans, seq_len, exact, entering, enters = heads
        held = stored._replace(page_table=page_table, tier_len=tier_len)
        scores, live = stored_scores(spec.layout, held, query_spans, spec.max_len)
        scores = jnp.concatenate([scores, entering], axis=1)
        live = jnp.concatenate([live, enters], axis=1)
        return lines_of(keep, KeepView(scores, live, seq_len, exact, tiers, kv_heads))

    def decide(_: int, tau: Array) -> Array:
        table = stored.page_table, stored.tier_len
        heads = (keep, *table, clock.query_spans, clock.seq_len, clock.exact, mean, leaving)
        by_layer = jax.tree.map(lambda x: x.reshape(-1, spec.num_heads, *x.shape[1:]), heads)
        # one layer's scores at a time
        return lax.map(layer_thresholds, by_layer).reshape(tau.shape)

    every = jnp.full((len(mean), 2), ALL)
    return lax.fori_loop(0, clock.decides.astype(jnp.int32), decide, every)


def stored_scores(
    layout: PageLayout, stored: Stored, query_spans: Array, max_len: int
) -> tuple[Array, Array]:
    """Mean scores float32 [B, n] of the stored tokens of every tier, and where there is one, bool
    [B, n]; `query_spans` as in `Rule`.
    """
    scores, live = [], []
    for tier in range(layout.tiers):
        total, position, there = read_token_data(
            stored.pages, layout, stored.page_table, stored.tier_len, tier, max_len
        )
        scores.append(mean_significance(total, position, query_spans))
        live.append(there)
    return jnp.concatenate(scores, axis=1), jnp.concatenate(live, axis=1)


def apply_plan(
    cache: KVCache,
    view: LayerView,
    plan: Plan,
    tokens: Tokens,
    admitted: Array,
    *,
    one_victim: bool = False,
    pages_a_round: int = 1,
) -> KVCache:
    """Carry out a plan for the heads `admitted` (bool [B]) of a layer; `tokens` begin with those
    that `plan.entering` classifies.
    """
    spec = cache.spec.unmerged
    stored = apply_event(
        view.stored(cache),
        unmerged_layout(cache, view),
        plan.rule,
        plan.moves,
        tokens,
        plan.entering,
        admitted,
        one_victim=one_victim,
        max_len=spec.max_len,
        pages_a_round=pages_a_round,
        kernels=spec.kernels,
    )
    return view.with_stored(cache, stored)
