"""Decode attention of one query token a request over the stored tiers and the recent window."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..pages import PageLayout, Pages
from .stream import Partial, add_significance, chunk_logits, chunk_mix, num_chunks, over_chunks, read_chunk, soft_cap


class Heads(NamedTuple):
    """What the `B` = requests x KV heads of one layer hold besides the pool."""

    page_table: Array  # int32 [B, max_pages]
    tier_len: Array  # int32 [B, tiers]
    recent_k: Array  # [B, window + flush, d]
    recent_v: Array  # [B, window + flush, d]
    recent_len: Array  # int32 [B]


def decode_attention(
    q: Array, pages: Pages, layout: PageLayout, heads: Heads, *, max_len: int, sm_scale: float, logits_soft_cap: float | None = None
) -> tuple[Array, Array, Array]:
    """Softmax attention of `q [B, G, d]` over every token its KV head holds; the pages are read and unpacked once for all G query heads.

    Returns the output float32 `[B, G, d]`, the pool's significance with this step's probabilities added (maximum over the G query
    heads after global normalisation), and the recent tokens' probabilities `[B, window + flush]` likewise (zeros when not scored).
    `max_len` bounds the tokens of a head.
    """
    q = q.astype(jnp.float32)
    recent_logits = _recent_logits(q, heads, sm_scale, logits_soft_cap)
    recent_v = jnp.where((jnp.arange(heads.recent_v.shape[1]) < heads.recent_len[:, None])[..., None], heads.recent_v, 0)
    partial = Partial.empty(q.shape[:2], q.shape[2])
    partial = partial.add(recent_logits, lambda p: jnp.einsum("bgt,btd->bgd", p, recent_v.astype(jnp.float32)))
    logits = []
    for tier in range(layout.tiers):
        partial, tier_logits = _attend_tier(q, partial, pages, layout, tier, heads, max_len, sm_scale, logits_soft_cap)
        logits.append(tier_logits)
    output, lse = partial.normalised()
    if not layout.scored:
        return output, pages.significance, jnp.zeros(recent_logits.shape[::2], jnp.float32)
    significance = pages.significance
    for tier in range(layout.tiers):
        significance = _score_tier(significance, logits[tier], lse, pages, layout, tier, heads)
    return output, significance, group_score(recent_logits, lse)


def group_score(logits: Array, lse: Array) -> Array:
    """Probability of each key, maximum over the query heads of the group: `[B, G, n]`, `[B, G]` to `[B, n]`."""
    return jnp.exp((logits - lse[..., None]).max(axis=1))


def _recent_logits(q, heads: Heads, sm_scale, cap) -> Array:
    logits = soft_cap(jnp.einsum("bgd,btd->bgt", q, heads.recent_k.astype(jnp.float32)) * sm_scale, cap)
    valid = jnp.arange(logits.shape[-1]) < heads.recent_len[:, None]
    return jnp.where(valid[:, None], logits, -jnp.inf)


def _attend_tier(q, partial, pages, layout, tier, heads, max_len, sm_scale, cap) -> tuple[Partial, Array]:
    """Take a tier into `partial`; the logits of its chunks `[chunks, B, G, chunk tokens]` are kept for the significance when scored."""
    chunk = read_chunk(pages, layout, tier, heads.page_table, heads.tier_len, jnp.int32(0))
    kept = jnp.zeros((num_chunks(layout, tier, max_len) if layout.scored else 0, *q.shape[:2], chunk.valid.shape[1]), jnp.float32)

    def body(i, state):
        partial, kept = state
        chunk = read_chunk(pages, layout, tier, heads.page_table, heads.tier_len, i)
        logits = chunk_logits(q, chunk, layout, tier, sm_scale, cap)
        if layout.scored:
            kept = lax.dynamic_update_index_in_dim(kept, logits, i, 0)
        return partial.add(logits, lambda p: chunk_mix(p, chunk, layout, tier)), kept

    return over_chunks(layout, tier, heads.tier_len, body, (partial, kept))


def _score_tier(significance, logits, lse, pages, layout, tier, heads) -> Array:
    def body(i, significance):
        chunk = read_chunk(pages, layout, tier, heads.page_table, heads.tier_len, i)
        return add_significance(significance, chunk, layout, tier, group_score(logits[i], lse))

    return over_chunks(layout, tier, heads.tier_len, body, significance)
