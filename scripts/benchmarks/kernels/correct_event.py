"""The compression event and the codecs against the XLA reference on the device at hand."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common.report import Row
from benchmarks.common.states import COMPRESSED, Setting, max_pages
from benchmarks.kernels.correct import Job, both, distance, verdict
from diffkv_jax.pallas_kernels.apply_event import FreeRing, Stored, Tokens, apply_event
from diffkv_jax.pallas_kernels.codecs import Full, KVFormat, demote, encode
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.pallas_kernels.plan_event import Rule, count_moves
from diffkv_jax.testing.random_pool import random_pool
from diffkv_jax.testing.readback import TierTokens, check_pool, read_tier

FORMATS = ("K8V4", "K4V2", "K8V4:1,2", "K4V2:2,4", "K8V8", "K4V1", "full")
DEMOTIONS = (("K8V4", "K4V2"), ("K8V4:1,2", "K4V2:2,4"), ("K8V8", "K2V1"), ("full", "K4V2"))
EVENTS = (  # tiers, thresholds (high, low) of significances that are uniform in [0, 2), one victim
    (COMPRESSED, (0.9, 0.4), False),
    (COMPRESSED, (1.9, 1.2), False),  # nearly all tokens move
    (COMPRESSED, (1.9, 0.0), True),
    (("K8V4:1,2", "K4V2:2,4"), (0.9, 0.4), False),
    (("K4V4",), (0.5, 0.5), False),
)
# share of codes that may differ by one: ratios within rounding of a half may go either way
HALF_WAY = 1e-3


def jobs(setting: Setting) -> list[list[Job]]:
    """Comparisons of the codecs and the event, a list a kernel."""
    formats, demotions, events = (
        (FORMATS[1:2], DEMOTIONS[:1], EVENTS[:1]) if setting.tiny else (FORMATS, DEMOTIONS, EVENTS)
    )
    event_jobs = []
    for tiers, tau, one_victim in events:
        case = f"{'+'.join(tiers)}, thresholds {tau}" + (", one victim" if one_victim else "")
        event_jobs.append(
            (
                {"kernel": "count_moves, apply_event", "case": case},
                partial(event_rows, setting, case, tiers, tau, one_victim),
            )
        )
    return [
        [
            ({"kernel": "encode", "case": name}, partial(encode_row, setting, name))
            for name in formats
        ],
        [
            ({"kernel": "demote", "case": f"{a} to {b}"}, partial(demote_row, setting, a, b))
            for a, b in demotions
        ],
        event_jobs,
    ]


def _exact(setting: Setting) -> list[jax.Array]:
    rng = np.random.default_rng(1)
    shape = (3, 64, 32) if setting.tiny else (257, 128, setting.kernels.tokens_per_block)
    return [
        jnp.asarray(rng.normal(size=shape) * 3 + rng.normal(size=(shape[1], 1)) * 5, jnp.float32)
        for _ in range(2)
    ]


def _same_blocks(fmt: KVFormat, got: Any, wanted: Any) -> Row:
    """Decoded values; where a code is one off, the error is one step, so few of them stay below the
    limit.
    """
    decoded = [
        [np.asarray(x) for x in fmt.decode(type(block)(*map(jnp.asarray, block)))]
        for block in (got, wanted)
    ]
    off = max(float(np.mean(a != b)) for a, b in zip(got[:2], wanted[:2], strict=True))
    error = max(distance(a, b) for a, b in zip(*decoded, strict=True))
    return verdict(
        error if off <= HALF_WAY else float("inf"), 1e-6 if isinstance(fmt.key, Full) else 1e-2
    )


def encode_row(setting: Setting, name: str) -> Row:
    """Quantisation of exact blocks."""
    fmt = KVFormat.parse(name)
    return _same_blocks(
        fmt, *both(setting, lambda kernels: partial(encode, fmt, kernels=kernels), *_exact(setting))
    )


def demote_row(setting: Setting, source: str, target: str) -> Row:
    """Requantisation; on integer codes every bit is the same."""
    high, low = KVFormat.parse(source), KVFormat.parse(target)
    block = jax.jit(high.encode)(*_exact(setting))
    return _same_blocks(
        low, *both(setting, lambda kernels: partial(demote, high, low, kernels=kernels), block)
    )


def event_rows(
    setting: Setting, case: str, tiers: Sequence[str], tau: tuple[float, float], one_victim: bool
) -> list[Row]:
    """The plan, exactly; then the event: tokens of each head and tier in slot order, the pages and
    the ring.
    """
    head_dim, max_len, most = (64, 260, 90) if setting.tiny else (128, 900, 600)
    layout = PageLayout.solve(
        tuple(map(KVFormat.parse, tiers)),
        head_dim,
        tokens=setting.kernels.tokens_per_block,
        max_len=max_len,
        scored=True,
    )
    sizes = [(0, 0), (33, 65), (most, 3), (70, 0), (1, most)][:: 2 if setting.tiny else 1]
    lengths = [pair[: layout.tiers] for pair in sizes]
    stored = event_state(layout, lengths, max_len)
    heads, n = len(lengths), 8 if setting.tiny else 32
    rng = np.random.default_rng(2)
    k, v = (jnp.asarray(rng.normal(size=(heads, n, head_dim)), jnp.float32) for _ in range(2))
    position = jnp.tile(most + 100 + jnp.arange(n, dtype=jnp.int32), (heads, 1))
    tokens = Tokens(k, v, jnp.asarray(rng.uniform(0, 2, (heads, n)), jnp.float32), position)
    entering = jnp.asarray(rng.integers(0, layout.tiers + 1, (heads, n)), jnp.int32)
    receives = jnp.stack(
        [(entering == tier + 1).any(axis=1) for tier in range(layout.tiers)], axis=1
    )
    # one query has scored every token
    spans = jnp.zeros((heads, 8, 2), jnp.int32).at[:, -1].set(jnp.array([2 * max_len, 1]))
    rule = Rule(
        jnp.tile(jnp.asarray(tau, jnp.float32), (heads, 1)), spans, jnp.ones(heads, bool), receives
    )
    admitted = jnp.ones(heads, bool).at[-1].set(heads == 1)
    options: dict[str, Any] = {"one_victim": one_victim, "max_len": max_len}

    def count(kernels: Kernels):
        return lambda s, rule: count_moves(
            s.pages, layout, s.page_table, s.tier_len, rule, kernels=kernels, **options
        )

    def event(kernels: Kernels):
        return lambda *a: apply_event(
            a[0], layout, *a[1:], pages_a_round=2, kernels=kernels, **options
        )

    moves = both(setting, count, stored, rule)
    same = all(np.array_equal(a, b) for a, b in zip(*moves, strict=True))
    planned = jax.tree.map(jnp.asarray, moves[1])
    got, wanted = both(setting, event, stored, rule, planned, tokens, entering, admitted)
    if np.array_equal(wanted.tier_len, np.asarray(stored.tier_len)):
        raise AssertionError("the case moves nothing")
    exact = verdict(0.0 if same else float("inf"), 0.0)
    return [
        {"kernel": "count_moves", "case": case, **exact},
        {"kernel": "apply_event", "case": case, **verdict(_same_stored(layout, got, wanted), 1e-2)},
    ]


def event_state(layout: PageLayout, lengths: Sequence[Sequence[int]], max_len: int) -> Stored:
    """Random stored tokens with tables and a ring that keep the invariants; all pages beyond them
    are free, full of rubbish.
    """
    pool = random_pool(layout, lengths, [0] * len(lengths), max_len=max_len, slots=1)
    spare, old = len(lengths) * max_pages(layout, max_len), len(pool.pages["payload"])
    arrays = {
        name: np.concatenate([x, np.repeat(x[:1] * 0, spare, axis=0)])
        for name, x in pool.pages.items()
    }
    num_pages, table, used = old + spare, np.full_like(pool.page_table, old + spare), []
    for head, sizes in enumerate(pool.tier_len):
        counts = [layout.pages_for(tier, int(n)) for tier, n in enumerate(sizes)]
        columns = [*range(counts[0]), *range(table.shape[1] - sum(counts[1:]), table.shape[1])]
        table[head, columns] = pool.page_table[head, columns]
        used += table[head, columns].tolist()
    free = np.setdiff1d(np.arange(num_pages), used)
    start = num_pages // 2  # free pages wrap around the end of the ring
    ids = np.roll(np.concatenate([free, np.zeros(len(used))]), start).astype(np.int32)
    ring = FreeRing(jnp.asarray(ids), jnp.int32(start), jnp.int32(len(free)))
    return Stored(
        Pages(**jax.tree.map(jnp.asarray, arrays)),
        ring,
        jnp.asarray(table),
        jnp.asarray(pool.tier_len),
    )


def _same_stored(layout: PageLayout, got: Stored, wanted: Stored) -> float:
    """Largest distance of K and V of a tier; infinite where positions, scores, lengths, pages or
    the ring are wrong.
    """
    check_pool(layout, got.page_table, got.tier_len, got.ring)
    if not np.array_equal(got.tier_len, wanted.tier_len) or int(got.ring.count) != int(
        wanted.ring.count
    ):
        return float("inf")
    error = 0.0
    for head, sizes in enumerate(wanted.tier_len):
        for tier, n in enumerate(sizes):
            ours, theirs = (
                read_tier(x.pages, layout, x.page_table[head], tier, int(n)) for x in (got, wanted)
            )
            error = max(error, _same_tokens(ours, theirs))
    return error


def _same_tokens(got: TierTokens, wanted: TierTokens) -> float:
    if not (
        np.array_equal(got.position, wanted.position)
        and np.array_equal(got.significance, wanted.significance)
    ):
        return float("inf")
    return max(distance(got.k, wanted.k), distance(got.v, wanted.v)) if len(got.position) else 0.0
