"""A compression event in plain jax.numpy: victims leave, new tokens are encoded, pages move."""

import jax.numpy as jnp
from jax import Array

from ..branch import when
from ..pages import PageLayout
from ..plan_event.reference import DROPPED, Moves, Rule, stored_victims
from .reference import Stored, Tokens, append_tokens, remove_tokens


def apply_event(
    stored: Stored,
    layout: PageLayout,
    rule: Rule,
    moves: Moves,
    tokens: Tokens,
    entering: Array,
    admitted: Array,
    *,
    one_victim: bool,
    max_len: int,
    pages_a_round: int,
) -> Stored:
    """`apply_event` of api.py in plain jax.numpy; `pages_a_round` is that of `remove_tokens`.

    Behind a condition on the whole plan, so that all of it has been read from the pool before the
    pool changes: no copy is needed.
    """
    del moves  # found out again, so that all is read before anything changes
    gate = admitted[:, None]
    entering = jnp.where(gate, entering, DROPPED)
    victims, falls = [], None
    for tier in range(layout.tiers):
        victim, low = stored_victims(
            stored.pages,
            layout,
            stored.page_table,
            stored.tier_len,
            rule,
            tier,
            one_victim=one_victim,
            max_len=max_len,
        )
        victims.append(victim & gate)
        if tier == 0 and layout.tiers == 2:
            falls = low & gate

    def change(stored: Stored) -> Stored:
        if layout.scored and layout.tokens_per_group == 1:  # whole blocks stay as they are
            for tier in reversed(range(layout.tiers)):
                demoted = falls if tier == 0 else None
                stored = remove_tokens(
                    stored, layout, tier, victims[tier], demoted, pages_a_round=pages_a_round
                )
        for tier in range(layout.tiers):
            stored = append_tokens(stored, layout, tier, tokens, entering == tier + 1)
        return stored

    busy = jnp.any(entering != DROPPED) | jnp.any(jnp.stack([victim.any() for victim in victims]))
    return when(busy, change, stored)
