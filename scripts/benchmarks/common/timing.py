"""Timing of jitted steps on a device: many steps a measurement, competitors interleaved in one run,
median and spread.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        samples: measurements of each competitor.
        sample_seconds: a measurement goes over as many calls as take about this long.
        repeats: steps that one call of a `Looped` makes at most, in a loop on the device.
        patience: a competitor whose call takes longer than this many seconds is measured once.
    """

    samples: int = 9
    sample_seconds: float = 0.05
    repeats: int = 16
    patience: float = 2.0


@dataclass(frozen=True)
class Timing:
    """Seconds a step: median, least and largest of the measurements."""

    median: float
    least: float
    largest: float

    @property
    def spread(self) -> float:
        """(largest - least) / median."""
        return (self.largest - self.least) / self.median


class Looped:
    """A step whose state goes round: `step(state, *operands) -> state`, `repeats` times a call, the
    state donated.
    """

    def __init__(self, step: Callable, repeats: int = 1, steps: int = 1):
        self.steps, self._call = repeats * steps, jax.jit(repeated(step, repeats), donate_argnums=0)

    def on(self, state: Any, *operands: Any) -> "Runner":
        """The competitor that starts from `state`. Several may share the compiled step."""
        return Runner(self, state, operands)


def repeated(step: Callable, repeats: int) -> Callable:
    """`step` applied `repeats` times, a static number: the loop needs no read of the device."""
    if repeats == 1:
        return step
    return lambda state, *operands: lax.fori_loop(
        0, repeats, lambda _, state: step(state, *operands), state
    )


class Runner:
    """One competitor of `interleaved`."""

    def __init__(self, looped: Looped, state: Any, operands: tuple):
        self.looped, self.state, self.operands = looped, state, operands

    def run(self, calls: int) -> float:
        """Seconds of one step, from `calls` calls in a row."""
        began = time.perf_counter()
        for _ in range(calls):
            self.state = self.looped._call(self.state, *self.operands)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - began) / (calls * self.looped.steps)

    def calls(self, effort: Effort) -> int:
        """Compile, warm up, and find how many calls a measurement needs; 0 for a step that is out
        of patience.
        """
        self.run(1)
        seconds = self.run(1) * self.looped.steps
        return (
            0
            if seconds > effort.patience
            else max(1, min(1000, round(effort.sample_seconds / max(seconds, 1e-7))))
        )


class FreshRunner(Runner):
    """A competitor whose step uses its state up: every call starts from a copy of the first one,
    made before the clock starts.
    """

    def run(self, calls: int) -> float:
        """Seconds of one step, from `calls` calls in a row."""
        states = jax.block_until_ready([jax.tree.map(jnp.copy, self.state) for _ in range(calls)])
        began = time.perf_counter()
        jax.block_until_ready(
            [self.looped._call(states.pop(), *self.operands) for _ in range(calls)]
        )
        return (time.perf_counter() - began) / (calls * self.looped.steps)

    def calls(self, effort: Effort) -> int:
        """As `Runner.calls`, but there must be memory for a copy of the state a call."""
        return min(super().calls(effort), 6)


def interleaved(runners: Mapping[str, Runner], effort: Effort) -> dict[str, Timing]:
    """Time all competitors in turns, so that the card's clock and temperature are the same for
    all.
    """
    calls = {name: runner.calls(effort) for name, runner in runners.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for sample in range(effort.samples):
        for name, runner in runners.items():
            if calls[name] or sample == 0:
                seconds[name].append(runner.run(max(calls[name], 1)))
    return {name: Timing(float(np.median(s)), min(s), max(s)) for name, s in seconds.items()}


def copy_bandwidth(nbytes: int, effort: Effort) -> Timing:
    """Seconds of copying `nbytes` from device memory to device memory: `2 * nbytes / seconds` is
    the bandwidth.
    """
    source = jnp.arange(nbytes // 4, dtype=jnp.uint32)
    copied = jax.jit(jnp.copy)

    def run(calls: int) -> float:
        began = time.perf_counter()
        out = source
        for _ in range(calls):
            out = copied(source)
        out.block_until_ready()
        return (time.perf_counter() - began) / calls

    run(2)
    calls = max(1, round(effort.sample_seconds / run(2)))
    seconds = [run(calls) for _ in range(effort.samples)]
    return Timing(float(np.median(seconds)), min(seconds), max(seconds))
