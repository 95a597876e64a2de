"""Where the lines between tiers lie for each head: thresholds relative to uniform attention, or
budgets of tokens.
"""

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.pallas_kernels.apply_event import Stored
from diffkv_jax.pallas_kernels.pages import PageLayout, read_token_data
from diffkv_jax.pallas_kernels.plan_event import mean_significance
from diffkv_jax.policy.selection import PROTECTED, Selection

# thresholds that every score reaches, and those of protected tokens
ALL, PROTECTED_ONLY = -PROTECTED, PROTECTED / 1e6


def uniform_thresholds(alpha: Array, seq_len: Array) -> Array:
    """`alpha / P`, float32 [B, 2] (DiffKV, arXiv 2412.03131 sec. 4); `alpha` [B, 2], `seq_len`
    int32 [B].
    """
    return alpha / jnp.maximum(seq_len, 1)[:, None]


def budget_thresholds(
    selection: Selection, budget: Array, exact: Array, scores: Array, live: Array, sharing: int
) -> Array:
    """The scores that as many tokens of each head reach as its budget has room for; of equal scores
    at the line none does.

    Args:
        budget: float32 [B], tokens of a head; those that stay exact in the recent window count.
        exact: int32 [B], how many those are.
        scores, live: float32 and bool [B, n], the others.
        sharing: with `selection.pooled`, how many neighbours share their room: the KV heads of a
            layer, or of all layers.

    Returns:
        float32 [B].
    """

    most = scores.shape[1]  # budgets of whole layers are larger, and a sum of them would overflow

    def room(tokens: Array) -> Array:
        return jnp.clip(jnp.floor(tokens + 1e-3) - exact, 0, most).astype(jnp.int32)

    if selection.pooled is None:
        return reached_by(scores, live, room(budget))
    # Ada-KV (arXiv:2407.11550): every head keeps a share of its own budget, the rest goes to the
    # best of all heads that share.
    floor = reached_by(scores, live, room(budget * selection.pooled))
    boosted = jnp.where(scores >= floor[:, None], PROTECTED, scores)
    scores, live = (x.reshape(-1, sharing * x.shape[1]) for x in (boosted, live))
    shared = reached_by(scores, live, room(budget).reshape(-1, sharing).sum(axis=1))
    return jnp.minimum(jnp.repeat(shared, sharing), floor)


def in_whole_blocks(kept: Array, leaving: Array, scores: Array, together: int) -> Array:
    """The tokens `kept` (bool [B, n]) and the best of the others that are `leaving`, of equal ones
    the older, up to whole blocks.

    As many leave as fill blocks of `together` tokens, so there are always enough: no block is ever
    part-filled (docs/design.md 2).
    """
    wanted = -(-kept.sum(axis=1) // together) * together
    return lowest(jnp.where(leaving, jnp.where(kept, -jnp.inf, -scores), jnp.inf), wanted)


def lowest(x: Array, count: Array) -> Array:
    """Where the `count` int32 [B] lowest numbers of each row are, of equal ones the first: `[B, n]`
    to bool [B, n].
    """
    return jnp.argsort(jnp.argsort(x, axis=1), axis=1) < count[:, None]


def stored_scores(
    layout: PageLayout, stored: Stored, observed: Array, max_len: int
) -> tuple[Array, Array]:
    """Mean significance float32 [B, n] of the stored tokens of every tier, and where there is one,
    bool [B, n]; `observed` as in `Rule`.
    """
    scores, live = [], []
    for tier in range(layout.tiers):
        total, position, there = read_token_data(
            stored.pages, layout, stored.page_table, stored.tier_len, tier, max_len
        )
        scores.append(mean_significance(total, position, observed))
        live.append(there)
    return jnp.concatenate(scores, axis=1), jnp.concatenate(live, axis=1)


def reached_by(scores: Array, live: Array, room: Array) -> Array:
    """The score that at most `room` live ones of each row reach, and protected ones always: [B, n],
    [B, n], [B] to [B].
    """
    scores = jnp.where(live, scores, -jnp.inf)
    threshold = kth_largest(scores, jnp.maximum(room, 1))
    above = jnp.nextafter(threshold, jnp.inf)
    # the next one may count as 0
    above = jnp.where(threshold == 0, jnp.finfo(jnp.float32).tiny, above)
    threshold = jnp.where((scores >= threshold[:, None]).sum(axis=1) > room, above, threshold)
    return jnp.where(
        room >= live.sum(axis=1),
        ALL,
        jnp.minimum(jnp.where(room > 0, threshold, PROTECTED_ONLY), PROTECTED_ONLY),
    )


def kth_largest(x: Array, k: Array) -> Array:
    """Exactly the `k`-th largest number of each row, float32 [B, n] and int32 [B] (from 1 to n) to
    [B].

    Bit by bit, 32 passes of compare and count: a sort of long rows takes XLA many times as long on
    a CPU.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # unsigned integers in the order of the numbers
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def bit(i: Array, found: Array) -> Array:
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where((ordered >= candidate[:, None]).sum(axis=1) >= k, candidate, found)

    found = lax.fori_loop(0, 32, bit, jnp.zeros(x.shape[0], jnp.uint32))
    return lax.bitcast_convert_type(
        jnp.where(found >> 31 == 1, found & jnp.uint32(0x7FFFFFFF), ~found), jnp.float32
    )
