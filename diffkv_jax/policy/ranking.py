"""Lines drawn between scores: the k-th largest, what a budget reaches, whole blocks."""

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.policy.score import PROTECTED

# Thresholds that every score reaches, and those of protected tokens alone.
ALL, PROTECTED_ONLY = -PROTECTED, PROTECTED / 1e6


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
