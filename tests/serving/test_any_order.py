"""Random requests, cancels and stalls: nothing is lost, leaked or changed."""

import numpy as np
import pytest
from engines import WINDOW, alone, check_pool_whole, engine
from hypothesis import Phase, given, settings, strategies as st

import diffkv_jax as dkv
from diffkv_jax.pallas_kernels.native.build import why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")
POLICY = dkv.diffkv(1.0, 0.0, queries=16, **WINDOW)
OWN = dkv.diffkv(1.5, 0.4, queries=16, **WINDOW)

submits = st.fixed_dictionaries(
    {
        "length": st.integers(1, 120),
        "most": st.integers(1, 120),
        "drawn": st.booleans(),
        "own": st.booleans(),
        "ends": st.booleans(),
        "priority": st.integers(0, 1),
    }
)
moves = st.one_of(submits, st.integers(1, 12), st.tuples(st.just("cancel"), st.integers(0, 99)))


def play(e, plan) -> list:
    """The requests after all moves and until nothing is left: numbers are steps."""
    rng, requests, steps = np.random.default_rng(0), [], 0
    for move in plan:
        if isinstance(move, dict):
            stops = rng.integers(0, 97, 4).tolist() if move["ends"] else ()
            requests.append(
                e.submit(
                    rng.integers(0, 97, move["length"]).tolist(),
                    max_new_tokens=move["most"],
                    sampling=dkv.Sample(temperature=1.5) if move["drawn"] else None,
                    seed=len(requests),
                    stop_token_ids=stops,
                    policy=OWN if move["own"] else None,
                    priority=move["priority"],
                )
            )
        elif isinstance(move, tuple):
            if requests:
                requests[move[1] % len(requests)].cancel()
        else:
            for _ in range(move):
                steps += 1
                told(requests, e.step())
                pages_are_conserved(e)
    while e.busy:
        told(requests, e.step())
        pages_are_conserved(e)
        assert (steps := steps + 1) < 20_000, "it never ends"
    return requests


def told(requests, events) -> None:
    for event in events:
        assert event.request in requests
        event.request.heard = [*getattr(event.request, "heard", []), *event.tokens]


def pages_are_conserved(e) -> None:
    """Free ones and those that somebody holds are all there are, each once."""
    slots = e._scheduler.slots
    ring, none = slots.pool.ring, slots.fixed.spec.num_pages
    free = np.asarray(ring.ids)[(int(ring.start) + np.arange(int(ring.count))) % none]
    tables = [one.row.page_table for one in e._scheduler.reading]
    if slots.rows is not None:
        tables.append(np.asarray(slots.rows.page_table)[:, slots.running])
    held = np.concatenate([np.zeros(0, int), *(np.asarray(t).ravel() for t in tables)])
    held = held[held != none]
    assert slots.free == len(free)
    assert sorted([*free.tolist(), *held.tolist()]) == list(range(none))


def check(e, requests, expected=alone) -> None:
    for request in requests:
        assert request.finish_reason in ("eos", "length", "cancelled")
        assert getattr(request, "heard", []) == request.tokens
        wanted = expected(request, OWN if request.policy is not None else POLICY)
        if request.finish_reason == "cancelled":
            assert wanted[0][: len(request.tokens)] == request.tokens
        else:
            assert wanted == (request.tokens, request.finish_reason)
    check_pool_whole(e)


@pytest.fixture(scope="module")
def hopeful():
    """An engine that lets everybody in at once, into a pool that is too small for it."""
    e = engine(POLICY, memory_budget="0.6MiB")
    e._scheduler._has_room = e._scheduler._fits = lambda *_: True
    return e


EFFORT = dict(deadline=None, derandomize=True, phases=[Phase.generate], database=None)


@settings(max_examples=6, **EFFORT)
@given(plan=st.lists(moves, min_size=5, max_size=20))
def test_nothing_is_lost_or_changed(hopeful, plan):
    check(hopeful, play(hopeful, plan))


@pytest.mark.slow
@pytest.mark.long
@settings(max_examples=150, **EFFORT)
@given(plan=st.lists(moves, min_size=10, max_size=60))
def test_nothing_is_lost_or_changed_for_long(hopeful, plan):
    check(hopeful, play(hopeful, plan))


def test_the_check_sees_another_token_and_a_lost_page(hopeful):
    """Both are put in by hand."""
    requests = play(
        hopeful,
        [{"length": 9, "most": 9, "drawn": False, "own": False, "ends": False, "priority": 0}],
    )
    requests[0].tokens[-1] += 1
    with pytest.raises(AssertionError):
        check(hopeful, requests)
    slots = hopeful._scheduler.slots
    pool, ring = slots.pool, slots.pool.ring
    slots.pool = pool._replace(ring=type(ring)(ring.ids, ring.start, ring.count - 1))
    with pytest.raises(AssertionError):
        pages_are_conserved(hopeful)
    slots.pool = pool
