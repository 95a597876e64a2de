"""The compression event: which tokens of a layer change tier, whether the pages suffice, and the change itself (docs/design.md 1)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache import CacheSpec
from diffkv_jax.pallas_kernels.compact import Stored, Tokens, append_tokens, read_side, remove_tokens
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.pallas_kernels.prune import DROPPED, HIGH, LOW, classify, least_significant, mean_significance


class Clock(NamedTuple):
    """Where each head stands. `B` = requests x KV heads."""

    seq_len: Array  # int32 [B] tokens seen
    observed: Array  # int32 [B, spans, 2] queries that have scored, as in `KVCache`
    alpha: Array  # float32 [B, 2] thresholds in units of 1 / seq_len


class Plan(NamedTuple):
    """What an event does to one layer."""

    entering: Array  # int32 [B, n] tier code of each token that leaves the recent window; DROPPED where there is none
    victims: tuple[Array, ...]  # per tier bool [B, capacity], slot order: leaves the tier
    demoted: Array  # bool [B, capacity of tier 0]: victims that go to tier 1
    pages: Array  # int32 [B] pages that the head needs beyond what it has


def plan_event(
    spec: CacheSpec, stored: Stored, clock: Clock, significance: Array, position: Array, leaving: Array, one_victim: bool
) -> Plan:
    """Classify the tokens that leave the window and the stored ones.

    `significance`, `position`, `leaving` (mask) are `[B, n]` and describe the tokens in the recent window (and prompt chunk). With
    `one_victim` at most the least significant token of the tier that the entering one joined is re-examined (Algorithm 1).
    Heads from which nothing leaves are left alone.
    """
    layout = spec.layout
    tau = clock.alpha / jnp.maximum(clock.seq_len, 1)[:, None]
    codes = classify(mean_significance(significance, position, clock.observed), tau, layout.tiers)
    entering = jnp.where(leaving, codes, DROPPED)
    stirred = leaving.any(axis=-1)
    victims, demoted = [], jnp.zeros((stirred.shape[0], spec.capacity(0)), bool)
    for tier in range(layout.tiers):
        if not layout.scored:
            victims.append(jnp.zeros((stirred.shape[0], spec.capacity(tier)), bool))
            continue
        joined = (entering == tier + 1).any(axis=-1)
        victim, low = _stored_victims(spec, stored, clock, tau, tier, joined if one_victim else None)
        victims.append(victim & stirred[:, None])
        if tier == 0:
            demoted = low & stirred[:, None]
    return Plan(entering, tuple(victims), demoted, _pages_needed(layout, stored, entering, victims, demoted))


def _stored_victims(spec: CacheSpec, stored: Stored, clock: Clock, tau: Array, tier: int, joined: Array | None) -> tuple[Array, Array]:
    """Masks `[B, capacity]` of a tier's tokens that leave it, and of those among them that fall to the low tier."""
    layout, capacity = spec.layout, spec.capacity(tier)
    live = jnp.arange(capacity) < stored.tier_len[:, tier, None]
    total = read_side(stored.pages.significance, layout, stored.page_table, tier, capacity)
    position = read_side(stored.pages.position, layout, stored.page_table, tier, capacity)
    mean = mean_significance(total, position, clock.observed)
    codes = classify(mean, tau, layout.tiers)
    stays = HIGH if tier == 0 else LOW
    victim = live & (codes != stays) & ((codes == DROPPED) | (tier == 0))
    if joined is not None:
        victim = victim & least_significant(mean, position, live) & joined[:, None]
    return victim, victim & (codes == LOW) & (tier == 0)


def _pages_needed(layout: PageLayout, stored: Stored, entering: Array, victims: list[Array], demoted: Array) -> Array:
    """Pages beyond the present ones that each head will hold after the event (never more in between: see `remove_tokens`)."""
    before = sum(layout.pages_for(t, stored.tier_len[:, t]) for t in range(layout.tiers))
    after = jnp.zeros_like(stored.tier_len[:, 0])
    for tier in range(layout.tiers):
        arriving = (entering == tier + 1).sum(axis=-1) + (demoted.sum(axis=-1) if tier == 1 else 0)
        after = after + layout.pages_for(tier, stored.tier_len[:, tier] - victims[tier].sum(axis=-1) + arriving)
    return jnp.maximum(after - before, 0)


def admit(needed: Array, free: Array) -> Array:
    """Which requests get all the pages they need, `needed [R]`, in order while `free []` lasts; one that does not fit takes none."""

    def take(left, need):
        fits = need <= left
        return left - jnp.where(fits, need, 0), fits

    return lax.scan(take, free, needed)[1]


def apply_plan(layout: PageLayout, stored: Stored, plan: Plan, tokens: Tokens, admitted: Array, *, pages_a_round: int) -> Stored:
    """Carry out a plan for the heads `admitted [B]`; `tokens` are those that `plan.entering` classifies.

    `pages_a_round` is that of `remove_tokens`.

    Behind a condition on the whole plan, so that all of it has been read from the pool before the pool changes: no copy is needed.
    """
    gate = admitted[:, None]
    victims = [victim & gate for victim in plan.victims]
    falls = plan.demoted & gate if layout.tiers == 2 else None
    entering = jnp.where(gate, plan.entering, DROPPED)

    def change(stored: Stored) -> Stored:
        if layout.scored:
            for tier in reversed(range(layout.tiers)):
                demoted = falls if tier == 0 else None
                stored = remove_tokens(stored, layout, tier, victims[tier], demoted, pages_a_round=pages_a_round)
        for tier in range(layout.tiers):
            stored = append_tokens(stored, layout, tier, tokens, entering == tier + 1)
        return stored

    busy = jnp.any(entering != DROPPED) | jnp.any(jnp.stack([victim.any() for victim in victims]))
    return lax.cond(busy, change, lambda stored: stored, stored)
