"""The search of `fit_policy`: every path at a few points, then the best two where they meet the
goal, then the best once more.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffkv_jax.fitting.candidates import Path
from diffkv_jax.fitting.goal import Goal
from diffkv_jax.fitting.measure import Measured

FINALISTS = 2
NEAR = (-0.1, -0.03, 0.05)  # around the place where a path is foreseen to meet the goal
NEARER = (-0.03, -0.01, 0.01)  # likewise, for the best path
SLACK = 0.995  # of the bytes: what is counted later differs by part-filled pages


class Tried(NamedTuple):
    path: Path
    point: float
    measured: Measured


def search(
    measure: Callable[[Path, Sequence[float]], list[Measured]], paths: Sequence[Path], goal: Goal
) -> list[Tried]:
    """All that was tried, the best first; `measure` gives what a path costs at some points."""
    tried: dict[Path, list[Tried]] = {path: [] for path in paths}

    def at(path: Path, points: Sequence[float]) -> None:
        found = zip(points, measure(path, points), strict=True)
        every = tried[path] + [Tried(path, *one) for one in found]
        tried[path] = sorted({one.point: one for one in every}.values(), key=lambda one: one.point)

    for path in paths:
        at(path, path.coarse)
    longer = [path for path in paths if len(path.coarse) > 1]
    for steps, finalists in ((NEAR, FINALISTS), (NEARER, 1)):
        for path in sorted(longer, key=lambda path: _foreseen(tried[path], goal)[0])[:finalists]:
            place = _foreseen(tried[path], goal)[1]
            at(path, np.clip([place + step for step in steps], 0.0, 1.0).tolist())
    every = [one for some in tried.values() for one in some]
    return sorted(every, key=lambda one: goal.order(one.measured))


def _foreseen(points: list[Tried], goal: Goal) -> tuple[tuple[bool, float], float]:
    """How well a path will do, as `Goal.order` has it, and where: between the points that were
    measured, and beyond, the logarithm of the KL and the bytes are taken to be linear.
    """
    places = [one.point for one in points]
    fine = np.linspace(0.0, 1.0, 201)
    shares = _lines(fine, places, [one.measured.share for one in points])
    kls = np.exp(_lines(fine, places, [_log_kl(one.measured) for one in points]))
    if goal.share is not None:
        met, cost, excess = shares <= goal.share * SLACK, kls, shares
    else:
        met, cost, excess = kls <= goal.target_kl, shares, kls
    if not met.any():
        best = int(excess.argmin())
        return (True, float(excess[best])), float(fine[best])
    best = int(np.where(met, cost, np.inf).argmin())
    return (False, float(cost[best])), float(fine[best])


def _log_kl(found: Measured) -> float:
    """Of next to nothing, rounding may leave less than nothing."""
    return float(np.log(max(found.mean_kl, 1e-9)))


def _lines(at: np.ndarray, places: list[float], values: list[float]) -> np.ndarray:
    """Lines from value to value, the first and the last of them going on."""
    found = np.interp(at, places, values)
    for here, there, beyond in ((0, 1, at < places[0]), (-1, -2, at > places[-1])):
        slope = (values[there] - values[here]) / (places[there] - places[here])
        found = np.where(beyond, values[here] + slope * (at - places[here]), found)
    return found
