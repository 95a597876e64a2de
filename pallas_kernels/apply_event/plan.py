"""Tokens and pages of heads after a compression event: the arithmetic of all who plan one."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ..pages import PageLayout
from ..plan_event.reference import DROPPED, Moves


class Sizes(NamedTuple):
    """What an event changes of `B` heads; int32."""

    arriving: Array  # [B, tiers] entering tokens of each tier
    leaving: Array  # [B, tiers] stored tokens that leave each tier, downwards or for good
    tier_len: Array  # [B, tiers] tokens of each tier after
    more: Array  # [B] pages after beyond those before, negative where there are fewer


def sizes_after(layout: PageLayout, tier_len: Array, entering: Array, moves: Moves) -> Sizes:
    """Sizes after an event in which tokens of the tier codes `entering [B, n]` enter and stored
    ones leave as `moves` says; `tier_len [B, tiers]` before.
    """
    arriving = jnp.stack(
        [(entering == tier + 1).sum(axis=-1, dtype=jnp.int32) for tier in range(layout.tiers)],
        axis=-1,
    )
    leaving = moves.dropped.at[:, 0].add(moves.demoted)
    after = tier_len - leaving + arriving
    if layout.tiers > 1:
        after = after.at[:, 1].add(moves.demoted)
    more = sum(
        layout.pages_for(tier, after[:, tier]) - layout.pages_for(tier, tier_len[:, tier])
        for tier in range(layout.tiers)
    )
    return Sizes(arriving, leaving, after, jnp.asarray(more))


def of_admitted(entering: Array, moves: Moves, admitted: Array) -> tuple[Array, Moves]:
    """Both for heads of which those not `admitted [B]` stay as they are: nothing enters or leaves
    them.
    """
    gate = admitted[:, None]
    dropped, demoted = jnp.where(gate, moves.dropped, 0), jnp.where(admitted, moves.demoted, 0)
    return jnp.where(gate, entering, DROPPED), Moves(dropped, demoted, moves.victim)


def pages_beyond(layout: PageLayout, tier_len: Array, entering: Array, moves: Moves) -> Array:
    """Pages int32 `[B]` beyond the present ones that each head will hold after the event (never
    more in between: see `apply_event`). Arguments as of `sizes_after`.
    """
    return jnp.maximum(sizes_after(layout, tier_len, entering, moves).more, 0)
