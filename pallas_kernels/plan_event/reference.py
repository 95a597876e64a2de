"""A token's tier from its mean significance (DiffKV, arXiv 2412.03131 sec. 4, Algorithm 1)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ..pages import PageLayout, Pages, read_token_data

DROPPED, HIGH, LOW = 0, 1, 2  # tier codes: 0 is dropped, code t is stored tier t - 1


class Rule(NamedTuple):
    """Which stored tokens of the `B` heads leave their tier in a compression event."""

    tau: Array  # float32 [B, 2] thresholds of the mean significance (high, low)
    query_spans: Array  # int32 [B, spans, 2] (end, length) of positions whose queries scored
    has_new_tokens: Array  # bool [B] heads that some token enters; nothing leaves the others
    receives: Array  # bool [B, tiers] tiers that a token enters; read with `one_victim` only


class Moves(NamedTuple):
    """How many stored tokens leave, and with `one_victim` which."""

    dropped: Array  # int32 [B, tiers]
    demoted: Array  # int32 [B] from tier 0 to tier 1
    # int32 [B, tiers] slot of the one token that leaves the tier, -1 when none does or without
    # `one_victim`
    victim: Array


def scored_by(position: Array, query_spans: Array) -> Array:
    """Queries int32 `[B, ...]` at or after `position [B, ...]` in the spans `query_spans [spans, 2,
    B]` (end, length), which come last here: gathered by page, they are as long as the pool.
    """
    position = position.astype(jnp.int32)
    spans = query_spans.reshape(*query_spans.shape, *(1,) * (position.ndim - 1))
    return sum((jnp.clip(x[0] - position, 0, x[1]) for x in spans), jnp.zeros_like(position))


def mean_significance(total: Array, position: Array, query_spans: Array) -> Array:
    """`S / n`, `n` the queries that scored the token: those at or after its position in the spans
    `query_spans [B, spans, 2]` (end, length).

    `total`, `position [B, tokens]`.
    """
    queries = scored_by(position, jnp.moveaxis(query_spans, 0, -1))
    return total / jnp.maximum(queries, 1).astype(jnp.float32)


def classify(mean: Array, tau: Array, tiers: int) -> Array:
    """Tier code of mean significance `mean [B, n]` under `tau [B, 2]` (high, low), strictly."""
    below_high, below_low = mean < tau[:, :1], mean < tau[:, 1:]
    kept = jnp.where(below_high, LOW, HIGH) if tiers == 2 else jnp.full(mean.shape, HIGH)
    return jnp.where(below_low, DROPPED, kept)


def least_significant(mean: Array, position: Array, candidate: Array) -> Array:
    """Mask `[B, n]` of the candidate with the least mean in each row, the oldest of equals; none
    where a row has no candidate.
    """
    masked = jnp.where(candidate, mean, jnp.inf)
    least = candidate & (masked == masked.min(axis=-1, keepdims=True))
    age = jnp.where(least, position.astype(jnp.int32), jnp.iinfo(jnp.int32).max)
    return least & (age == age.min(axis=-1, keepdims=True))


def stored_victims(
    pages: Pages,
    layout: PageLayout,
    page_table: Array,
    tier_len: Array,
    rule: Rule,
    tier: int,
    *,
    one_victim: bool,
    max_len: int,
) -> tuple[Array, Array]:
    """Masks `[B, capacity]` of a tier's tokens that leave it, and of those that fall to the low."""
    total, position, live = read_token_data(pages, layout, page_table, tier_len, tier, max_len)
    if not layout.scored:
        return jnp.zeros_like(live), jnp.zeros_like(live)
    mean = mean_significance(total, position, rule.query_spans)
    codes = classify(mean, rule.tau, layout.tiers)
    stays = HIGH if tier == 0 else LOW
    leaves = live & (codes != stays) & ((codes == DROPPED) | (tier == 0))
    victim = leaves & rule.has_new_tokens[:, None]
    if one_victim:
        victim = victim & least_significant(mean, position, live) & rule.receives[:, tier, None]
    return victim, victim & (codes == LOW) & (tier == 0)


def count_moves(
    pages: Pages,
    layout: PageLayout,
    page_table: Array,
    tier_len: Array,
    rule: Rule,
    *,
    one_victim: bool,
    max_len: int,
) -> Moves:
    """`count_moves` of api.py in plain jax.numpy."""
    dropped, slots, demoted = [], [], jnp.zeros(page_table.shape[0], jnp.int32)
    for tier in range(layout.tiers):
        victim, falls = stored_victims(
            pages, layout, page_table, tier_len, rule, tier, one_victim=one_victim, max_len=max_len
        )
        dropped.append((victim & ~falls).sum(axis=-1))
        slots.append(jnp.where(victim.any(axis=-1) & one_victim, jnp.argmax(victim, axis=-1), -1))
        if tier == 0:
            demoted = falls.sum(axis=-1)
    return Moves(jnp.stack(dropped, axis=-1), demoted, jnp.stack(slots, axis=-1))
