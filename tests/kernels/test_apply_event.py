"""The compression event of many heads at once, against a NumPy transcription of the rule over the
tokens read back, and against XLA.
"""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from event_rule import World, check_tensor, expected, read
from event_states import INFINITE, MAX_LEN, NEW, SCENARIOS, Case, build
from implementations import IMPLEMENTATIONS, LONG, SLOW, crossed, marked

from diffkv_jax.pallas_kernels.apply_event import FreeRing, Stored, Tokens, apply_event
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.pallas_kernels.plan_event import Rule, count_moves
from diffkv_jax.testing.readback import check_pool, slot_addresses

CASES = [
    Case("K8V4+K4V2"),
    Case("K8V4+K4V2", one_victim=True),
    Case("K8V4:1,2+K4V2:2,4", head_dim=128, tokens=128),
    Case("full+K4V2", tokens=64),
    Case("K4nV4+K2nV2n"),
    Case("K4V4", head_dim=128, tokens=64),
    Case("K8V4+K4V2", scored=False),
]
case_id = lambda case: "-".join(map(str, case))  # noqa: E731
PLAIN = CASES[0]


def check(world: World, one_victim: bool, after: Stored) -> None:
    """Every head holds what the rule says, in its order; heads that are not admitted are untouched;
    the pool is consistent.
    """
    layout, before = world.layout, world.stored
    check_pool(layout, after.page_table, after.tier_len, after.ring)
    for head in range(len(before.tier_len)):
        for tier, want in enumerate(expected(world, head, one_victim)):
            assert after.tier_len[head, tier] == len(want), (head, tier)
            got = read(layout, after.pages, after.page_table[head], tier, len(want))
            assert [t.position for t in got] == [t.position for t in want], (head, tier)
            assert [t.significance for t in got] == [t.significance for t in want]
            for a, b in zip(want, got, strict=True):
                check_tensor(layout.formats[tier].key, a.k, b.k)
                check_tensor(layout.formats[tier].value, a.v, b.v)
        if not world.admitted[head]:
            np.testing.assert_array_equal(after.page_table[head], before.page_table[head])
            mine = [page for page in before.page_table[head] if page < len(before.ring.ids)]
            for name, array in before.pages.items():
                assert array[mine].tobytes() == after.pages[name][mine].tobytes()


@cache
def compiled(case: Case, kernels: Kernels):
    layout = dataclasses.replace(case.layout(), meta_dtype=kernels.meta_dtype)

    def event(stored: Stored, rule: Rule, tokens: Tokens, entering, admitted):
        how = dict(one_victim=case.one_victim, max_len=MAX_LEN, kernels=kernels)
        moves = count_moves(stored.pages, layout, stored.page_table, stored.tier_len, rule, **how)
        return moves, apply_event(
            stored, layout, rule, moves, tokens, entering, admitted, pages_a_round=1, **how
        )

    return jax.jit(event)


def run(case: Case, world: World, kernels: Kernels):
    """(moves, state after) in NumPy."""
    bits = world.stored.pages | {"meta": world.stored.pages["meta"].view(kernels.meta_dtype)}
    pages = Pages(**jax.tree.map(jnp.asarray, bits))
    arguments = jax.tree.map(
        jnp.asarray, (world.rule, world.tokens, world.entering, world.admitted)
    )
    moves, after = compiled(case, kernels)(
        jax.tree.map(jnp.asarray, world.stored._replace(pages=pages)), *arguments
    )
    arrays = {
        name: np.asarray(getattr(after.pages, name)).view(array.dtype)
        for name, array in world.stored.pages.items()
    }
    return jax.tree.map(np.asarray, moves), jax.tree.map(np.asarray, after._replace(pages=arrays))


@cache
def world_and_reference(case: Case) -> tuple[World, Any, Stored]:
    world = build(case)
    return (world, *run(case, world, Kernels("xla")))


EVENTS = crossed(
    marked(IMPLEMENTATIONS, mosaic_tpu=SLOW, mosaic_tpu_checked=LONG),
    [pytest.param(case, id=case_id(case)) for case in CASES],
    {("mosaic_tpu", case_id(PLAIN)): (), ("mosaic_tpu_checked", case_id(PLAIN)): SLOW},
)


@pytest.mark.daily(8)
@pytest.mark.parametrize(("kernels", "case"), EVENTS)
def test_an_event(case: Case, kernels: Kernels):
    world, moves, reference = world_and_reference(case)
    counted, after = run(case, world, kernels)
    jax.tree.map(np.testing.assert_array_equal, counted, moves)
    check(world, case.one_victim, after)
    np.testing.assert_array_equal(after.tier_len, reference.tier_len)
    layout, codes = world.layout, []
    for head, lengths in enumerate(after.tier_len):
        for tier, length in enumerate(lengths):
            both = (
                read(layout, s.pages, s.page_table[head], tier, length) for s in (after, reference)
            )
            for mine, theirs in zip(*both, strict=True):
                assert mine[:2] == theirs[:2]
                for a, b in zip(mine[2:], theirs[2:], strict=True):
                    codes += (
                        [np.abs(a.codes.astype(int) - b.codes)]
                        if a.codes is not None
                        else [a.exact != b.exact]
                    )
    codes = np.concatenate(codes)
    assert codes.max() <= 1 and codes.mean() < 1e-4  # a code at a tie may fall to the other side
    assert int(after.ring.count) == int(reference.ring.count)


def test_the_scenarios_do_what_they_say():
    world, moves, after = world_and_reference(PLAIN)
    names = list(SCENARIOS)
    dropped, demoted = (
        dict(zip(names, moves.dropped, strict=True)),
        dict(zip(names, moves.demoted, strict=True)),
    )
    lengths = dict(zip(names, world.stored.tier_len, strict=True))
    assert (dropped["all dropped"] == lengths["all dropped"]).all() and demoted[
        "all demoted"
    ] == lengths["all demoted"][0] > 96
    assert demoted["mixed"] > 5 < dropped["mixed"].min() and (moves.victim == -1).all()
    assert (
        not dropped["nothing leaves"].any()
        and not dropped["no new tokens"].any()
        and not demoted["nothing leaves"]
    )
    assert int(world.stored.ring.start) + int(world.stored.ring.count) > len(world.stored.ring.ids)
    assert after.tier_len.sum() > 300
    _, moves, _ = world_and_reference(CASES[1])
    assert (
        moves.victim.max() > 32
        and (moves.victim == -1).any()
        and moves.demoted.sum() > 0 < moves.dropped.sum()
    )


NATIVE = [p for p in IMPLEMENTATIONS if p.id == "cpu"]


def live_columns(layout: PageLayout, stored: Stored) -> np.ndarray:
    """Which columns of the page tables `[B, max_pages]` are in use."""
    column, (high, low) = (
        np.arange(stored.page_table.shape[1]),
        (layout.pages_for(t, stored.tier_len[:, t, None]) for t in (0, 1)),
    )
    return (column < high) | (column >= len(column) - low)


@pytest.mark.parametrize("kernels", NATIVE)
def test_dead_columns_are_never_read(kernels: Kernels):
    world, _, _ = world_and_reference(PLAIN)
    stored = world.stored
    rubbish = np.random.default_rng(0).choice([-7, 0, 3, 10**6, -(2**31)], stored.page_table.shape)
    table = np.where(live_columns(world.layout, stored), stored.page_table, rubbish).astype(
        np.int32
    )
    dirty = world._replace(stored=stored._replace(page_table=table))
    _, after = run(PLAIN, dirty, kernels)
    clean = np.where(live_columns(world.layout, after), after.page_table, len(stored.ring.ids))
    clean[~world.admitted] = stored.page_table[~world.admitted]
    check(world, False, after._replace(page_table=clean))


def broken(stored: Stored, kind: str) -> Stored:
    """A state that leads out of an array, or to a page twice; heads 0 and 1 are admitted."""
    lengths, table, ring = stored.tier_len.copy(), stored.page_table.copy(), stored.ring
    if kind == "length beyond the table":
        lengths[0, 0] = 10**9
    elif kind == "negative length":
        lengths[1, 1] = -1
    elif kind == "page beyond the pool":
        table[0, 0] = len(ring.ids)
    elif kind == "negative page":
        table[1, -1] = -1
    elif kind == "page of another head":
        table[0, 0] = table[1, 0]
    ring = {
        "ring begins outside": FreeRing(ring.ids, np.int32(-1), ring.count),
        "ring is too long": FreeRing(ring.ids, ring.start, np.int32(len(ring.ids) + 1)),
        "pages do not suffice": FreeRing(ring.ids, ring.start, np.int32(ring.count - 1)),
        "ring names a held page": FreeRing(
            np.full_like(ring.ids, table[0, 0]), ring.start, ring.count
        ),
        "ring names no page": FreeRing(np.full_like(ring.ids, -1), ring.start, ring.count),
    }.get(kind, ring)
    return stored._replace(tier_len=lengths, page_table=table, ring=ring)


REFUSED = {
    "length beyond the table": "tier_len",
    "negative length": "tier_len",
    "page beyond the pool": "page table names",
    "negative page": "page table names",
    "page of another head": "page twice",
    "ring begins outside": "ring of free pages",
    "ring is too long": "ring of free pages",
    "pages do not suffice": "more pages than are free",
    "ring names a held page": "not free",
    "ring names no page": "not free",
}


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("kind", REFUSED)
def test_native_kernels_refuse_to_leave_an_array(kernels: Kernels, kind: str):
    world, _, _ = world_and_reference(PLAIN)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=REFUSED[kind]):
        run(PLAIN, world._replace(stored=broken(world.stored, kind)), kernels)


MISTAKES = {
    "another threshold": lambda w: w._replace(
        rule=w.rule._replace(tau=w.rule.tau * np.float32(1.01))
    ),
    "not strict": lambda w: w._replace(
        rule=w.rule._replace(tau=np.nextafter(w.rule.tau, INFINITE))
    ),
    "a query more": lambda w: w._replace(rule=w.rule._replace(query_spans=w.rule.query_spans + 1)),
    "new tokens everywhere": lambda w: w._replace(
        rule=w.rule._replace(has_new_tokens=w.rule.has_new_tokens | True)
    ),
    "all admitted": lambda w: w._replace(admitted=w.admitted | True),
    "an entering token less": lambda w: w._replace(
        entering=np.where(np.arange(NEW) == 20, 0, w.entering)
    ),
}


@pytest.mark.parametrize(
    "mistake",
    [*MISTAKES, "victims in another order", "a bit of a payload", "a scale", "a page lost"],
)
def test_the_check_sees_mistakes(mistake: str):
    world, _, after = world_and_reference(PLAIN)
    check(world, False, after)
    if mistake in MISTAKES:
        world = MISTAKES[mistake](world)
    else:
        after = spoil(world.layout, after, mistake)
    with pytest.raises(AssertionError):
        check(world, False, after)


def spoil(layout: PageLayout, after: Stored, mistake: str) -> Stored:
    """The state with one thing wrong."""
    head = list(SCENARIOS).index("all demoted")
    pages = {name: array.copy() for name, array in after.pages.items()}
    page, block, lane = slot_addresses(layout, after.page_table[head], 1, 40)
    if mistake == "a page lost":
        return after._replace(ring=FreeRing(after.ring.ids, after.ring.start, after.ring.count - 1))
    if mistake == "a scale":
        pages["meta"][page[0], 0, lane[0]] *= np.float16(1.01)
    elif mistake == "a bit of a payload":
        pages["payload"][page[0], 3, lane[0]] ^= 16
    else:
        two = np.array([30, 31])
        for name in ("significance", "position"):
            pages[name][page[two], block[two], lane[two]] = pages[name][
                page[two[::-1]], block[two[::-1]], lane[two[::-1]]
            ]
    return after._replace(pages=pages)
