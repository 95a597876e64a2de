"""The Triton kernel of decode attention that scores, once the splits of a head are joined."""

from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ..pages import PageLayout
from .triton_attend import Task, place_of, shares
from .triton_blocks import stored_blocks
from .triton_keys import gathered


class Refs(NamedTuple):
    """The Refs of `score_kernel`."""

    page_table: Any  # int32 [B, max_pages]
    tier_len: Any  # int32 [B, tiers]
    recent_len: Any  # int32 [B]
    lse: Any  # float32 [B, G], base 2
    logits: Any  # `Partials.logits`
    base: Any  # `Partials.base`
    recent_logits: Any  # `Partials.recent_logits`
    payload: Any  # uint8 [num_pages, rows, T]
    old_significance: Any  # aliased with significance
    recent: Any  # float32 [B, slots]
    significance: Any  # float32 [num_pages, blocks, T]


def score_kernel(*refs, task: Task):
    """Program (head, split): the probabilities of its share of the tokens, reduced over the group,
    added to their significance in place.

    Reads the base-2 log-sum-exp float32 `[B, G]` and the kept logits (2 or 4 bytes a token and
    query head); reads and writes the significance of live tokens (8 bytes a token). The first split
    also writes the recent tokens' probabilities.
    """
    r = Refs(*refs)
    blocks, layout, group, slots = task.blocks, task.layout, r.logits.shape[2], r.recent.shape[1]
    head, split = pl.program_id(0), pl.program_id(1)
    number = jnp.arange(blocks.rows, dtype=jnp.int32)
    member = jnp.minimum(number, group - 1)
    # what fills up the group has probability 0
    shift = plgpu.load(gathered(r.lse, head, member), mask=number < group, other=jnp.inf)

    def score(step, _, tier: int):
        stored = stored_blocks(r, layout, tier, head, r.tier_len[head, tier], step, blocks.keys)
        column = jnp.arange(blocks.keys, dtype=jnp.int32)[None, :]
        place = place_of(tier, step, blocks)
        at = gathered(r.logits, head, place, member[:, None], column)
        kept = plgpu.load(at).astype(jnp.float32)
        largest = plgpu.load(gathered(r.base, head, place, member))
        probabilities = jnp.exp2(kept + (largest - shift)[:, None])
        scores = _over_group(probabilities, layout, group).reshape(stored.valid.shape)
        page = jnp.where(stored.live, stored.page, r.significance.shape[0])  # past the end: none
        lanes = jnp.arange(layout.tokens, dtype=jnp.int32)[None, :]
        at = gathered(r.significance, page[:, None], stored.block[:, None], lanes)
        plgpu.store(at, plgpu.load(at, mask=stored.valid, other=0.0) + scores, mask=stored.valid)

    for tier, (first, stop) in enumerate(shares(r.tier_len, task, head, split)):
        lax.fori_loop(first, stop, partial(score, tier=tier), None)

    @pl.when(split == 0)
    def _():
        slot = jnp.arange(pl.next_power_of_2(slots), dtype=jnp.int32)
        live = slot < jnp.minimum(r.recent_len[head], slots)
        mask = jnp.broadcast_to(live[None, :], (blocks.rows, live.size))
        at = gathered(r.recent_logits, head, member[:, None], jnp.minimum(slot, slots - 1)[None, :])
        kept = plgpu.load(at, mask=mask, other=-jnp.inf)
        at, probabilities = gathered(r.recent, head, slot), jnp.exp2(kept - shift[:, None])
        plgpu.store(at, _over_group(probabilities, layout, group), mask=slot < slots)


def _over_group(probabilities: Array, layout: PageLayout, group: int) -> Array:
    """One score a key from `[rows, n]`, `group` of them query heads, the others zeros: `[n]`."""
    return probabilities.max(axis=0) if layout.group == "max" else probabilities.sum(axis=0) / group
