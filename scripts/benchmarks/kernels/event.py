"""Time of the compression event and of its plan, for the heads of several layers in one call."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.report import Row
from benchmarks.common.states import (
    COMPRESSED,
    Setting,
    layer_tables,
    pages_of,
    random_pages,
    uniform,
)
from benchmarks.common.timing import Effort, FreshRunner, Looped, Runner
from benchmarks.kernels.compare import Sizes, compare
from diffkv_jax.pallas_kernels.apply_event import FreeRing, Stored, Tokens, apply_event
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.plan_event import Rule, count_moves

# thresholds (high, low) of significances that are uniform in [0, 1)
DECODE_EVENT, PROMPT_EVENT = (0.02, 0.0), (0.87, 0.39)


def _event(setting: Setting, sizes: Sizes, thresholds: Sequence[float], entering: int):
    """Stored tokens of all heads of several layers, layout, rule and the bound of a head's tokens;
    every token in the high tier.
    """
    heads, max_len = (
        sizes.event_layers * sizes.batch * setting.kv_heads,
        sizes.context + entering + 2 * setting.slots,
    )
    layout, lengths = setting.layout(COMPRESSED, max_len), (sizes.context, 0)
    more = layout.pages_for(0, entering) + layout.pages_for(1, sizes.context) + 1
    num_pages = heads * (pages_of(layout, lengths) + more)
    (table,), free = layer_tables(layout, lengths, heads, 1, num_pages, max_len)
    ids = jnp.asarray(np.concatenate([free, np.zeros(num_pages - len(free), np.int32)]))
    ring = FreeRing(ids, jnp.int32(0), jnp.int32(len(free)))
    stored = Stored(
        random_pages(layout, num_pages, max_len),
        ring,
        jnp.asarray(table),
        jnp.tile(jnp.asarray(lengths), (heads, 1)),
    )
    # one query has scored every token
    spans = jnp.zeros((heads, 8, 2), jnp.int32).at[:, -1].set(jnp.array([2 * max_len, 1]))
    tau = jnp.tile(jnp.asarray(thresholds, jnp.float32), (heads, 1))
    rule = Rule(tau, spans, jnp.ones(heads, bool), jnp.ones((heads, layout.tiers), bool))
    return stored, layout, rule, max_len


def time_count(setting: Setting, sizes: Sizes, effort: Effort) -> Row:
    """Classification of every stored token."""
    stored, layout, rule, max_len = _event(setting, sizes, DECODE_EVENT, sizes.flush)
    heads = len(stored.page_table)
    empty = jnp.zeros((heads, layout.tiers), jnp.int32)

    def runner(kernels: Kernels) -> Runner:
        def step(state, pages, table, lengths, rule):
            moves = count_moves(
                pages,
                layout,
                table,
                lengths,
                rule,
                one_victim=False,
                max_len=max_len,
                kernels=kernels,
            )
            return tuple(moves)

        state = (empty + 0, empty[:, 0] + 0, empty + 0)
        return Looped(step).on(state, stored.pages, stored.page_table, stored.tier_len, rule)

    return compare(setting, runner, effort, heads * sizes.context * layout.token_data_bytes, "GB/s")


def time_event(
    setting: Setting,
    sizes: Sizes,
    effort: Effort,
    thresholds: Sequence[float],
    entering: int,
    pages_a_round: int,
) -> Row:
    """The event of all heads in one call; rate counts the bytes of significance and positions and
    of every token that moves, both ways.
    """
    stored, layout, rule, max_len = _event(setting, sizes, thresholds, entering)
    heads, share = len(stored.page_table), thresholds[0]
    count = lambda stored, rule: count_moves(  # noqa: E731
        stored.pages,
        layout,
        stored.page_table,
        stored.tier_len,
        rule,
        one_victim=False,
        max_len=max_len,
        kernels=setting.kernels,
    )
    moves = jax.jit(count)(stored, rule)
    k, v = [setting.queries(heads, entering, seed=seed) for seed in (3, 4)]
    position = jnp.tile(sizes.context + jnp.arange(entering, dtype=jnp.int32), (heads, 1))
    tokens = Tokens(k, v, uniform((heads, entering), 5), position)
    codes = jnp.ones((heads, entering), jnp.int32)
    admitted = jnp.ones(heads, bool)
    options: dict[str, Any] = {
        "one_victim": False,
        "max_len": max_len,
        "pages_a_round": pages_a_round,
    }

    def runner(kernels: Kernels) -> Runner:
        def step(stored, rule, moves, tokens, codes, admitted):
            return apply_event(
                stored, layout, rule, moves, tokens, codes, admitted, kernels=kernels, **options
            )

        looped = Looped(step)
        return FreshRunner(looped, stored, (rule, moves, tokens, codes, admitted))

    moving = sizes.context * share * layout.token_bytes(0) * 2 + entering * (
        4 * setting.head_dim + layout.token_bytes(0)
    )
    return compare(
        setting, runner, effort, heads * (sizes.context * layout.token_data_bytes + moving), "GB/s"
    )
