"""Tokens into and out of tiers and pages into and out of the ring, against plain Python lists, over
random sequences of operations.
"""

from collections import deque
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from pages_in_python import operations, play

from diffkv_jax.pallas_kernels.apply_event import FreeRing
from diffkv_jax.pallas_kernels.apply_event.ring import allocate, release
from diffkv_jax.pallas_kernels.pages import Pages

SEQUENCES = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
KINDS = ("high", "low", "drop high", "drop low", "demote", "demote or drop", "release")
OPERATIONS = st.tuples(
    st.sampled_from(KINDS), st.sampled_from([0.05, 0.3, 0.7, 1.0]), st.integers(0, 2**31)
)


@pytest.mark.slow
@SEQUENCES
@given(st.lists(OPERATIONS, min_size=1, max_size=14))
def test_random_sequences(sequence):
    play(operations("K8V4", "K4V2"), sequence)


@pytest.mark.slow
@SEQUENCES
@given(st.lists(OPERATIONS, min_size=1, max_size=8))
def test_random_sequences_of_one_unscored_tier(sequence):
    play(operations("K8V4", scored=False), sequence)


def test_a_full_pool_empties_and_fills_again():
    """The ring wraps around, and every page is used."""
    fill = [("high", 1.0, seed) for seed in range(6)]
    cycle = [
        *fill,
        ("demote", 1.0, 0),
        *fill,
        ("drop low", 1.0, 1),
        ("demote or drop", 0.7, 2),
        *fill,
        ("release", 1.0, 3),
    ]
    ops = operations("K8V4", "K4V2")
    model, _ = play(ops, fill)
    assert model.free() == 0
    model, stored = play(ops, cycle * 2 + fill)
    assert model.free() == 0 == int(stored.ring.count)


def test_operations_without_a_mask_change_nothing():
    ops = operations("K8V4", "K4V2")
    _, stored = play(ops, [("high", 1.0, 0), ("demote", 0.4, 1), ("low", 0.3, 2)])
    again = ops.run(stored, **ops.nothing())
    for one, other in zip(jax.tree.leaves(stored), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "mistake", ["lost token", "page twice", "stale column", "wrong value", "wrong score"]
)
def test_the_check_sees_mistakes(mistake: str):
    ops = operations("K8V4", "K4V2")
    model, stored = play(ops, [("high", 1.0, 0), ("demote", 0.5, 1)])
    page = int(stored.page_table[0, 0])
    bad = {
        "lost token": stored._replace(tier_len=stored.tier_len.at[0, 0].add(-1)),
        "page twice": stored._replace(page_table=stored.page_table.at[1, 0].set(page)),
        "stale column": stored._replace(
            page_table=stored.page_table.at[0, ops.max_pages // 2].set(0)
        ),
        "wrong value": stored._replace(
            pages=Pages(*_arrays(stored.pages, payload=stored.pages.payload.at[page, 0, 0].add(1)))
        ),
        "wrong score": stored._replace(
            pages=Pages(
                *_arrays(stored.pages, significance=stored.pages.significance.at[page, 0, 0].add(1))
            )
        ),
    }[mistake]
    with pytest.raises(AssertionError):
        model.check(bad)


def _arrays(pages: Pages, **changed):
    return [
        changed.get(name, getattr(pages, name))
        for name in ("payload", "meta", "significance", "position")
    ]


# --- the ring alone ---


@cache
def ring_functions():
    return jax.jit(allocate, static_argnames="most"), jax.jit(release)


@SEQUENCES
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 4), min_size=3, max_size=3)), max_size=30
    )
)
def test_ring_equals_a_queue(sequence):
    """First in, first out, in the order of the claimants; empty and full differ."""
    take, give = ring_functions()
    ring, queue, owned = FreeRing.full(8), deque(range(8)), [[], [], []]
    for taking, counts in sequence:
        if taking and sum(counts) <= len(queue):
            ids, ring = take(ring, jnp.array(counts), most=4)
            for mine, row, count in zip(owned, np.asarray(ids).tolist(), counts, strict=True):
                new = [queue.popleft() for _ in range(count)]
                assert row == new + [8] * (4 - count)
                mine += new
        elif not taking:
            ids, valid = np.full((3, 4), 8, np.int32), np.zeros((3, 4), bool)
            for head, count in enumerate(counts):
                for i in range(min(count, len(owned[head]))):
                    ids[head, 3 - i], valid[head, 3 - i] = owned[head].pop(), True
            queue.extend(ids[valid].tolist())
            ring = give(ring, jnp.asarray(ids), jnp.asarray(valid))
        free = [int(ring.ids[(int(ring.start) + i) % 8]) for i in range(int(ring.count))]
        assert free == list(queue)
