"""Random states of many heads for tests of the compression event, each head another scenario."""

from typing import NamedTuple

import numpy as np
from event_rule import World, expected, mean_of, sides

from diffkv_jax.pallas_kernels.apply_event import FreeRing, Stored, Tokens
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.pallas_kernels.plan_event import Rule
from diffkv_jax.testing.random_pool import random_pool
from diffkv_jax.testing.readback import slot_addresses

MAX_LEN, NEW, SLOTS = 960, 40, 48  # tokens of a head; tokens that may enter; tokens at hand
INFINITE = np.float32(np.inf)


class Scenario(NamedTuple):
    """What a head holds and what happens to it; thresholds as quantiles of its mean significances,
    or infinite.
    """

    pages: tuple[float, float]  # stored in each tier, in pages
    high: float
    low: float
    enters: tuple[float, float] = (0.4, 0.4)  # odds that a new token enters each tier
    has_new_tokens: bool = True
    admitted: bool = True


SCENARIOS = {
    "mixed": Scenario((2.4, 1.7), 0.6, 0.3),
    "nothing leaves": Scenario((1.9, 1.9), -1, -1),
    "all dropped": Scenario((2.3, 1.9), 2, 2),
    "all demoted": Scenario((3.6, 0.3), 2, -1),
    "full pages demoted, none free": Scenario((3, 1), 2, -1, (0, 0)),
    "not admitted": Scenario((1.4, 0.9), 0.7, 0.4, admitted=False),
    "empty": Scenario((0, 0), 0.5, 0.2),
    "no new tokens": Scenario((1.2, 0.8), 0.7, 0.4, (0, 0), has_new_tokens=False),
    "long": Scenario((12, 2.5), 0.25, 0.1, (0.7, 0.1)),
}


class Case(NamedTuple):
    """A layout and how the event runs."""

    formats: str
    head_dim: int = 64
    tokens: int = 32
    scored: bool = True
    one_victim: bool = False

    def layout(self) -> PageLayout:
        formats = tuple(map(KVFormat.parse, self.formats.split("+")))
        return PageLayout.solve(
            formats, self.head_dim, tokens=self.tokens, max_len=MAX_LEN, scored=self.scored
        )


def lengths_of(layout: PageLayout) -> np.ndarray:
    """Tokens of each tier of each head; a page of tier 1 counts as one of tier 0."""
    per_page = layout.tokens_per_page(0)
    wanted = [
        [round(min(pages * per_page, MAX_LEN / 2.5)) for pages in s.pages[: layout.tiers]]
        for s in SCENARIOS.values()
    ]
    if layout.tiers == 2:
        wanted[list(SCENARIOS).index("full pages demoted, none free")] = [
            2 * per_page,
            layout.tokens_per_page(1),
        ]
    return np.array(wanted, np.int32)


def build(case: Case, seed: int = 0) -> World:
    """Heads of all scenarios; dead lanes and pages hold rubbish, and the ring has exactly the pages
    that are needed, around its end.
    """
    rng, layout = np.random.default_rng(seed), case.layout()
    lengths = lengths_of(layout)
    pool = random_pool(
        layout, lengths, np.zeros(len(lengths), np.int32), max_len=MAX_LEN, slots=1, seed=seed
    )
    for head, row in enumerate(lengths):
        for tier, length in enumerate(row):
            at = slot_addresses(layout, pool.page_table[head], tier, int(length))
            pool.pages["position"][at] = rng.permutation(MAX_LEN)[:length]
            if layout.scored:  # tokens of no significance are ties
                pool.pages["significance"][at] = rng.uniform(0, 2, length) * (
                    rng.random(length) > 0.1
                )
    rule, entering = draw_rule(rng, layout, pool, lengths)
    tokens = Tokens(
        *(
            rng.normal(size=(len(lengths), SLOTS, layout.head_dim)).astype(np.float32)
            for _ in range(2)
        ),
        rng.uniform(0, 2, (len(lengths), SLOTS)).astype(np.float32),
        rng.integers(MAX_LEN, 2 * MAX_LEN, (len(lengths), SLOTS)).astype(np.int32),
    )
    admitted = np.array([s.admitted for s in SCENARIOS.values()])
    stored = Stored(pool.pages, None, pool.page_table, lengths)
    world = World(layout, stored, rule, tokens, entering, admitted)
    return world._replace(stored=with_ring(world, case.one_victim, rng))


def draw_rule(rng, layout: PageLayout, pool, lengths: np.ndarray) -> tuple[Rule, np.ndarray]:
    """Thresholds at the quantiles that the scenarios name, and codes of the new tokens."""
    heads = len(lengths)
    query_spans = np.stack(
        [rng.integers(300, 900, (heads, 2)), rng.integers(5, 400, (heads, 2))], axis=-1
    ).astype(np.int32)
    tau, entering = np.zeros((heads, 2), np.float32), np.zeros((heads, NEW), np.int32)
    for head, scenario in enumerate(SCENARIOS.values()):
        mean = mean_of(
            *sides(layout, pool.pages, pool.page_table[head], 0, lengths[head, 0]),
            query_spans[head],
        )
        for i, share in enumerate((scenario.high, scenario.low)):
            # a token's own: it stays
            inside = (
                np.quantile(mean, share, method="lower") if 0 <= share <= 1 and len(mean) else 0.01
            )
            tau[head, i] = INFINITE if share > 1 else -INFINITE if share < 0 else inside
        odds = [1 - sum(scenario.enters[: layout.tiers]), *scenario.enters[: layout.tiers]]
        entering[head] = rng.choice(len(odds), NEW, p=odds)
    receives = np.stack(
        [(entering == tier + 1).any(axis=-1) for tier in range(layout.tiers)], axis=-1
    )
    return Rule(
        tau, query_spans, np.array([s.has_new_tokens for s in SCENARIOS.values()]), receives
    ), entering


def with_ring(world: World, one_victim: bool, rng) -> Stored:
    """The state with clean table columns and a ring of just enough free pages, in random order,
    that wraps around.
    """
    layout, stored = world.layout, world.stored
    per_page = [layout.tokens_per_page(tier) for tier in range(layout.tiers)]
    needed, table, used = 0, np.array(stored.page_table), []
    for head, lengths in enumerate(stored.tier_len):
        before = [-(-int(n) // size) for n, size in zip(lengths, per_page, strict=True)]
        after = [
            -(-len(tokens) // size)
            for tokens, size in zip(expected(world, head, one_victim), per_page, strict=True)
        ]
        needed += max(sum(after) - sum(before), 0)
        used += [*table[head, : before[0]], *table[head, table.shape[1] - sum(before[1:]) :]]
        table[head, before[0] : table.shape[1] - sum(before[1:])] = -1
    rubbish = {"payload": 255, "meta": np.nan, "significance": np.nan, "position": 65535}
    num_pages = len(used) + needed
    places = rng.permutation(num_pages)[: len(used)]
    pages = {}
    for name, array in stored.pages.items():
        pages[name] = np.full((num_pages, *array.shape[1:]), rubbish[name], array.dtype)
        pages[name][places] = array[used]
    table = np.vectorize({**dict(zip(used, places, strict=True)), -1: num_pages}.__getitem__)(
        table
    ).astype(np.int32)
    free = rng.permutation(sorted(set(range(num_pages)) - set(places.tolist())))
    ids, start = np.full(num_pages, 10**6, np.int32), num_pages - needed // 2
    ids[(start + np.arange(needed)) % num_pages] = free
    assert needed > 1  # the ring wraps around
    return stored._replace(
        pages=pages,
        page_table=table,
        ring=FreeRing(ids, np.int32(start % num_pages), np.int32(needed)),
    )
