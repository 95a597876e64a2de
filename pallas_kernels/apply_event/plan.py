"""Tokens and pages of heads after a compression event: the arithmetic of all who plan one."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from ..pages import PageLayout
from ..plan_event.reference import DROPPED, Moves


class Sizes(NamedTuple):
    """What an event makes of `B` heads; int32 `[B]`, a tuple of one a tier where it says so."""

    arriving: tuple[Array, ...]  # entering tokens of each tier
    tier_len: tuple[Array, ...]  # tokens of each tier after
    more: Array  # pages after beyond those before, negative where there are fewer


def sizes_after(layout: PageLayout, tier_len: Array, entering: Array, moves: Moves) -> Sizes:
    """Sizes after an event in which tokens of the tier codes `entering [B, n]` enter and stored
    ones leave as `moves` says; `tier_len [B, tiers]` before.
    """
    before, after = jnp.zeros_like(moves.demoted), jnp.zeros_like(moves.demoted)
    arriving, lengths = [], []
    for tier in range(layout.tiers):
        arriving.append((entering == tier + 1).sum(axis=-1))
        gained = arriving[-1] + (moves.demoted if tier == 1 else -moves.demoted)
        lengths.append(tier_len[:, tier] - moves.dropped[:, tier] + gained)
        before = before + layout.pages_for(tier, tier_len[:, tier])
        after = after + layout.pages_for(tier, lengths[-1])
    return Sizes(tuple(arriving), tuple(lengths), after - before)


def leaving_of(moves: Moves) -> Array:
    """Stored tokens int32 `[B, tiers]` that leave their tier, downwards or for good."""
    return moves.dropped.at[:, 0].add(moves.demoted)


def of_admitted(entering: Array, moves: Moves, admitted: Array) -> tuple[Array, Moves]:
    """Both for heads of which those not `admitted [B]` stay as they are."""
    gate = admitted[:, None]
    dropped, demoted = jnp.where(gate, moves.dropped, 0), jnp.where(admitted, moves.demoted, 0)
    return jnp.where(gate, entering, DROPPED), Moves(dropped, demoted, moves.victim)


def pages_beyond(layout: PageLayout, tier_len: Array, entering: Array, moves: Moves) -> Array:
    """Pages int32 `[B]` beyond the present ones that each head will hold after the event (never
    more in between: see `apply_event`). Arguments as of `sizes_after`.
    """
    return jnp.maximum(sizes_after(layout, tier_len, entering, moves).more, 0)
