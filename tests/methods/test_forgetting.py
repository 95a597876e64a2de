"""A significance that forgets: every decision and sum against its definition
(oracles.forgetting).
"""

from collections import Counter

import pytest
from side_by_side import BRANCHES, Run, play, stays_as_it_is
from table_model import OBSERVE, STEPS

LENGTHS = [(5, 32, 20), (1, 70, 33), (9, 8, 64)]


def two_turns(flush: int, mistake: bool = False) -> Run:
    """Prompts, decode in which a request pauses, then second prompts: one that is long enough to
    forget all before it, a short one, none; and decode again.
    """
    run = Run(flush, "planted", 3, forgets=True)
    for head in run.heads.values():
        head.observe += mistake
    run.prefill((40, 11, 20))
    for _ in range(10):
        run.step()
    for _ in range(3):
        run.step(active=(True, False, True))
    run.prefill((20, 5, 0))
    for _ in range(9):
        run.step()
    assert run.near_ties() == 0, "choose another seed"
    return run


def test_two_turns_with_requests_due_at_different_steps():
    two_turns(4)


def test_the_comparison_sees_another_horizon():
    with pytest.raises(AssertionError):
        two_turns(4, mistake=True)


def test_nothing_old_stays_when_an_event_comes_as_rarely_as_the_horizon():
    assert OBSERVE < 32
    play(32, "planted", 1, (9, 8, 64), 34, forgets=True)


@pytest.mark.slow
def test_requests_that_have_ended_between_two_events_stay_as_they_are():
    run = play(4, "planted", 2, (9, 8, 64), 6, cache_dtype="bfloat16", forgets=True)
    stays_as_it_is(run, request=1, steps=6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["planted", "recorded"])
@pytest.mark.parametrize("flush, cache_dtype", [(1, "float32"), (4, "bfloat16"), (32, "float32")])
def test_every_decision(flush: int, cache_dtype: str, kind: str):
    """Prompts shorter than the window, of one chunk and of several."""
    branches, options = Counter(), {"cache_dtype": cache_dtype, "forgets": True}
    for seed, lengths in enumerate(LENGTHS, 20 if kind == "recorded" else 0):
        branches += play(flush, kind, seed, lengths, STEPS, **options).taken()
    assert set(branches) == BRANCHES, branches
