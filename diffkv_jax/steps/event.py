"""The compression event: which tokens of a layer change tier, whether the pages suffice, and the
change itself (docs/design.md 1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import CacheSpec
from diffkv_jax.pallas_kernels.apply_event import Stored, Tokens, apply_event, pages_beyond
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.pallas_kernels.plan_event import (
    DROPPED,
    Moves,
    Rule,
    classify,
    count_moves,
    mean_significance,
)
from diffkv_jax.policy.keep import (
    ALL,
    budget_thresholds,
    in_whole_blocks,
    stored_scores,
    uniform_thresholds,
)


class Clock(NamedTuple):
    """Where each head stands. `B` = requests x KV heads."""

    seq_len: Array  # int32 [B] tokens seen
    # int32 [B, spans, 2] queries that a token's score is divided by, as in `KVCache`
    observed: Array
    limits: Array  # float32 [B, 2] thresholds or budgets, as in `KVCache`
    exact: Array  # int32 [B] tokens that stay in the recent window
    decides: Array  # bool []; without, every token enters the high tier and none leaves it


class Plan(NamedTuple):
    """What an event does to `B` heads."""

    # int32 [B, n] tier code of each token that leaves the recent window; DROPPED where there is
    # none
    entering: Array
    rule: Rule  # which stored tokens leave their tier
    moves: Moves  # how many do
    pages: Array  # int32 [B] pages that the head needs beyond what it has


def plan_event(
    spec: CacheSpec,
    stored: Stored,
    clock: Clock,
    significance: Array,
    position: Array,
    leaving: Array,
    one_victim: bool,
) -> Plan:
    """Classify the tokens that leave the window and the stored ones.

    `significance`, `position`, `leaving` (mask) are `[B, n]` and describe the tokens in the recent
    window (and prompt chunk). With `one_victim` at most the least significant token of the tier
    that the entering one joined is re-examined (Algorithm 1). Heads from which nothing leaves are
    left alone.
    """
    layout, mean = spec.layout, mean_significance(significance, position, clock.observed)
    tau = _thresholds(spec, stored, clock, mean, leaving)
    codes = classify(mean, tau, layout.tiers)
    entering = jnp.where(leaving, codes, DROPPED)
    if layout.tokens_per_group > 1 and spec.selection.budgeted:
        # tier code 1
        entering = in_whole_blocks(
            entering != DROPPED, leaving, mean, layout.tokens_per_group
        ).astype(entering.dtype)
    receives = jnp.stack(
        [(entering == tier + 1).any(axis=-1) for tier in range(layout.tiers)], axis=-1
    )
    rule = Rule(tau, clock.observed, leaving.any(axis=-1), receives)
    moves = count_moves(
        stored.pages,
        layout,
        stored.page_table,
        stored.tier_len,
        rule,
        one_victim=one_victim,
        max_len=spec.max_len,
        kernels=spec.kernels,
    )
    return Plan(entering, rule, moves, pages_beyond(layout, stored.tier_len, entering, moves))


def _thresholds(
    spec: CacheSpec, stored: Stored, clock: Clock, mean: Array, leaving: Array
) -> Array:
    """Mean scores float32 [B, 2] below which a token is not high, and is dropped."""
    selection = spec.selection
    if selection.profiled:  # those that leave are marked by negative scores
        return jnp.zeros_like(clock.limits)
    if not selection.budgeted:
        return jnp.where(clock.decides, uniform_thresholds(clock.limits, clock.seq_len), 0.0)

    def layer_thresholds(heads: tuple[Array, ...]) -> Array:
        page_table, tier_len, observed, budgets, exact, entering, enters = heads
        held = stored._replace(page_table=page_table, tier_len=tier_len)
        scores, live = stored_scores(spec.layout, held, observed, spec.max_len)
        scores, live = (
            jnp.concatenate([scores, entering], axis=1),
            jnp.concatenate([live, enters], axis=1),
        )
        return tier_thresholds(spec, budgets, exact, scores, live, spec.attention.num_kv_heads)

    def decide(_: int, tau: Array) -> Array:
        budgets = clock.limits if selection.in_tokens else clock.limits * clock.seq_len[:, None]
        heads = (
            stored.page_table,
            stored.tier_len,
            clock.observed,
            budgets,
            clock.exact,
            mean,
            leaving,
        )
        by_layer = jax.tree.map(lambda x: x.reshape(-1, spec.num_heads, *x.shape[1:]), heads)
        # one layer's scores at a time
        return lax.map(layer_thresholds, by_layer).reshape(tau.shape)

    return lax.fori_loop(
        0, clock.decides.astype(jnp.int32), decide, jnp.full(clock.limits.shape, ALL)
    )


def tier_thresholds(
    spec: CacheSpec, budgets: Array, exact: Array, scores: Array, live: Array, sharing: int
) -> Array:
    """`budget_thresholds` of both columns of `budgets` [B, 2]; `sharing` neighbours may share
    theirs.
    """
    columns = [
        budget_thresholds(spec.selection, budget, exact, scores, live, sharing)
        for budget in budgets.T[-spec.layout.tiers :]
    ]
    return jnp.stack([columns[0], columns[-1]], axis=-1)


def admit(needed: Array, free: Array) -> Array:
    """Which requests get all the pages they need, `needed [R]`, in order while `free []` lasts; one
    that does not fit takes none.
    """

    def take(left, need):
        fits = need <= left
        return left - jnp.where(fits, need, 0), fits

    return lax.scan(take, free, needed)[1]


def apply_plan(
    spec: CacheSpec,
    layout: PageLayout,
    stored: Stored,
    plan: Plan,
    tokens: Tokens,
    admitted: Array,
    *,
    one_victim: bool,
    pages_a_round: int = 1,
) -> Stored:
    """Carry out a plan for the heads `admitted [B]` in the layer of `layout`; `tokens` begin with
    those that `plan.entering` classifies.
    """
    return apply_event(
        stored,
        layout,
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
