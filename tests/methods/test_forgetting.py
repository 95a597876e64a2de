"""A significance that forgets: every decision and sum against its definition
(oracles.forgetting).
"""

import copy
import dataclasses
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest
from side_by_side import BRANCHES, Run, play, stays_as_it_is
from table_model import OBSERVE, STEPS

from diffkv_jax.cache.cache import complete, with_significance
from diffkv_jax.methods.diffkv import MeanAttention
from diffkv_jax.policy.score import PROTECTED
from diffkv_jax.policy.stage import with_leaves
from diffkv_jax.steps import forget as module
from diffkv_jax.steps.forget import forget

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


@pytest.fixture(scope="module")
def decoding() -> Run:
    """Six steps after the event of a prompt."""
    return play(8, "planted", 1, (60, 30, 8), 6, forgets=True)


@pytest.mark.parametrize("pages_at_once", [1024, 11])
def test_requests_that_are_not_due_keep_their_bits(pages_at_once: int, decoding: Run, monkeypatch):
    """The pool goes in one part and in many, of which the last begins within the one before."""
    monkeypatch.setattr(module, "PAGES_AT_ONCE", pages_at_once)
    run, due, coming = copy.deepcopy(decoding), (True, False, True), (9, 9, 3)
    assert run.host.stored.pages.num_pages % 11 and run.host.stored.pages.num_pages > 22
    run.cache = forget(complete(run.cache), jnp.array(due), jnp.array(coming))
    old = run.held
    for (_, request, _), head in run.heads.items():
        if due[request]:
            head.forget(coming[request])
    run.check()
    for (layer, request, head), held in run.held.items():
        before = old[layer, request, head]
        same = [held[position][3] == before[position][3] for position in held]
        assert all(same) if not due[request] else not all(same)


def test_protected_tokens_stay_so(decoding: Run):
    cache = complete(decoding.cache)
    scores = cache.stored.pages.significance, cache.recent.significance
    cache = with_significance(cache, *(jnp.full_like(x, PROTECTED) for x in scores))
    after = forget(cache, jnp.full(3, True), 16)
    assert (np.asarray(after.stored.pages.significance) == np.float32(PROTECTED)).all()
    assert (np.asarray(after.recent.significance) == np.float32(PROTECTED)).all()
    assert not np.asarray(after.counters.query_spans)[..., 1].any()


def test_a_score_that_does_not_forget_adds_no_operation(decoding: Run):
    policy = with_leaves(decoding.cache.policy, score=MeanAttention(queries=16, forgets=False))
    cache = dataclasses.replace(complete(decoding.cache), policy=policy)
    assert forget(cache, jnp.full(3, True), 16) is cache


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
