"""Who is in which tier after every step of the whole cache, against the slow model of Algorithm 1
(docs/design.md 1): the paper's mean over all queries. What forgets: test_forgetting.py.
"""

from collections import Counter

import pytest
from side_by_side import BRANCHES, Run, play, stays_as_it_is
from table_model import MODEL, STEPS

from diffkv_jax import CausalLM

LENGTHS = [(5, 32, 20), (1, 70, 33), (9, 8, 64)]


def test_the_table_model_is_a_causal_lm():
    assert isinstance(MODEL, CausalLM)


@pytest.mark.slow
def test_algorithm_1_on_three_prompts():
    """flush=1, decision for decision; the slow tests take every branch."""
    assert set(play(1, "planted", 0, LENGTHS[0], 30).taken()) > {
        "recent to high",
        "recent to low",
        "recent to dropped",
    }


@pytest.mark.slow
def test_requests_that_have_ended_stay_as_they_are():
    stays_as_it_is(play(1, "planted", 2, LENGTHS[2], 4), request=1, steps=6)


@pytest.mark.slow
def test_requests_that_have_ended_between_two_events_stay_as_they_are():
    """An event comes after every `flush` steps of a request, so one that ended before has none."""
    stays_as_it_is(play(4, "planted", 2, LENGTHS[2], 6, cache_dtype="bfloat16"), request=1, steps=6)


@pytest.mark.daily(3)
@pytest.mark.parametrize("mistake", ["threshold", "window", "observed"])
def test_the_comparison_sees_other_decisions(mistake: str):
    run = Run(1, "planted", 0)
    for head in run.heads.values():
        head.alpha_high *= 1.3 if mistake == "threshold" else 1
        head.window += mistake == "window"
        head.observe += mistake == "observed"
    with pytest.raises(AssertionError):
        run.prefill(LENGTHS[1])
        for _ in range(10):
            run.step()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["planted", "recorded"])
@pytest.mark.parametrize("flush, cache_dtype", [(1, "float32"), (4, "bfloat16"), (32, "float32")])
def test_every_decision(flush: int, cache_dtype: str, kind: str):
    """Prompts shorter than the window, of one chunk and of several; every branch is taken."""
    branches = Counter()
    for seed, lengths in enumerate(LENGTHS, 20 if kind == "recorded" else 0):  # without near ties
        branches += play(flush, kind, seed, lengths, STEPS, cache_dtype=cache_dtype).taken()
    assert set(branches) == BRANCHES, branches
