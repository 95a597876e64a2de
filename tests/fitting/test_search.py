"""The search and its goal on paths whose costs are formulas."""

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.fitting.candidates import COARSE, Path, possible
from diffkv_jax.fitting.goal import Goal, goal_of
from diffkv_jax.fitting.measure import Measured
from diffkv_jax.fitting.search import search
from diffkv_jax.testing.tiny import tiny_model

WIDE, NARROW, WORSE = (Path("attention", (name, "K4V2")) for name in ("K8V8", "K8V4", "K4V4"))

ONE = np.ones((1, 1, 1, 2))


def costs(path: Path, point: float) -> Measured:
    """Bytes fall and the KL grows along a path; NARROW is smaller, WORSE dominated by NARROW."""
    share = {WIDE: 0.5, NARROW: 0.4, WORSE: 0.45}[path] - 0.15 * point
    kl = {WIDE: 0.002, NARROW: 0.004, WORSE: 0.02}[path] * np.exp(2 * point)
    return Measured(np.full((1, 64), kl), np.ones((1, 64)), 1.0, 1.0, share, ONE)


def found(goal: Goal, asked: list | None = None):
    def measure(path, points):
        if asked is not None:
            asked.append((path, tuple(points)))
        return [costs(path, point) for point in points]

    return search(measure, (WIDE, NARROW, WORSE), goal)


def best_of_all(goal: Goal) -> Measured:
    every = [costs(path, p) for path in (WIDE, NARROW, WORSE) for p in np.linspace(0, 1, 2001)]
    return min(every, key=goal.order)


@pytest.mark.parametrize(
    "goal",
    [
        Goal(0.42, None),
        Goal(0.36, None),
        Goal(0.27, None),
        Goal(None, 0.0021),
        Goal(None, 0.006),
        Goal(None, 0.02),
    ],
)
def test_finds_nearly_the_best(goal):
    tried = found(goal)
    best, exact = tried[0].measured, best_of_all(goal)
    assert goal.met(best) and goal.met(exact)
    assert goal.cost(exact) <= goal.cost(best) <= 1.25 * goal.cost(exact)
    # better than the coarse points alone
    coarse = [costs(path, p) for path in (WIDE, NARROW, WORSE) for p in COARSE]
    assert goal.order(best) <= min(map(goal.order, coarse))


def test_out_of_reach_comes_nearest():
    tried = found(Goal(0.1, None))
    assert not Goal(0.1, None).met(tried[0].measured)
    assert tried[0].measured.share == pytest.approx(0.25, abs=0.02)
    tried = found(Goal(None, 0.001))
    assert tried[0].measured.mean_kl == pytest.approx(0.002, rel=0.25)


def test_only_the_best_two_are_refined():
    asked = []
    found(Goal(0.36, None), asked)
    assert [path for path, _ in asked] == [WIDE, NARROW, WORSE, NARROW, WIDE, NARROW]
    assert all(points == COARSE for _, points in asked[:3])
    assert all(0 <= point <= 1 for _, points in asked for point in points)


def test_a_path_of_one_tier_is_measured_once():
    flat, asked = Path("nothing", ("K4V4",)), []

    def measure(path, points):
        asked.append((path, len(points)))
        kl, share = (0.003, 0.35) if path == flat else (costs(path, points[0]).mean_kl, 0.5)
        return [Measured(np.full((1, 64), kl), np.ones((1, 64)), 1.0, 1.0, share, ONE)] * len(
            points
        )

    tried = search(measure, (flat, WIDE), Goal(0.36, None))
    assert tried[0].path == flat and asked.count((flat, 1)) == 1
    assert [path for path, _ in asked] == [flat, WIDE, WIDE, WIDE]
    assert flat.policy(dkv.Exact(), (0.5,)) == flat.policy(dkv.Exact(), (0.1, 0.9))


def test_short_contexts_have_a_short_window():
    attention = tiny_model()[0].attention
    for context, window in ((2047, 32), (2048, 64)):
        (path,) = possible([WIDE], attention, context)
        policy = path.policy(dkv.Exact(), (0.5,))
        assert (policy.schedule.window, policy.schedule.flush) == (window, window // 2)


def test_goals():
    attention = tiny_model(kv_heads=1, head_dim=64, layers=2)[0].attention
    assert goal_of(attention, 0.25, None, None, 100) == Goal(0.25, None)
    assert goal_of(attention, None, None, "small", 100) == Goal(None, 0.03)
    assert goal_of(attention, None, None, None, 100) == Goal(None, 0.01)
    # 100 tokens of 2 layers, 64 channels of K and V at 2 bytes: 51,200 bytes
    assert goal_of(attention, None, 12_800, None, 100) == Goal(0.25, None)
    assert goal_of(attention, None, "1GiB", None, 100) == Goal(1.0, None)
    windowed = tiny_model(kv_heads=1, head_dim=64, layers=2, windows=(10, None))[0].attention
    assert goal_of(windowed, None, 14_080, None, 100).share == pytest.approx(0.5)
    # each request has windows of its own
    assert goal_of(windowed, None, 28_160, None, 100, 2).share == pytest.approx(0.5)
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"target_kl": -1}, {"target_kl": "tiny"}):
        given = {"share": None, "memory_budget": None, "target_kl": None} | wrong
        with pytest.raises(ValueError, match=next(iter(wrong))):
            goal_of(attention, context=100, **given)
    with pytest.raises(ValueError, match="share and target_kl are given"):
        goal_of(attention, 0.5, None, 0.1, 100)
