"""Requests for minutes on end: memory stays flat, and after `warm_up` nothing is compiled.
`DIFFKV_JAX_SOAK_MINUTES=10 pytest tests/serving/test_soak.py` goes on for longer.
"""

import os
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from engines import DIFFKV, WINDOW, check_pool_whole, engine

import diffkv_jax as dkv

MINUTES = float(os.environ.get("DIFFKV_JAX_SOAK_MINUTES", "1"))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Traffic:
    """Submits now and then, cancels some."""

    def __init__(self, seed: int):
        self.rng, self.open, self.ended = np.random.default_rng(seed), [], 0
        self.engine = engine(memory_budget="0.6MiB")
        scheduler = self.engine._scheduler
        scheduler._fits = scheduler._has_room = lambda *_: True  # so that some are parked

    def step(self) -> int:
        """One step; tokens that it made."""
        rng = self.rng
        if len(self.open) < 9 and rng.random() < 0.4:
            own = dkv.diffkv(1.4, 0.3, queries=16, **WINDOW)
            self.open.append(
                self.engine.submit(
                    rng.integers(0, 97, rng.integers(1, 150)).tolist(),
                    max_new_tokens=int(rng.integers(1, 150)),
                    sampling=dkv.Sample(temperature=1.2) if rng.random() < 0.5 else None,
                    logprobs=3 if rng.random() < 0.2 else None,
                    penalties={"presence": 1.0} if rng.random() < 0.2 else None,
                    policy=own if rng.random() < 0.3 else None,
                )
            )
        if self.open and rng.random() < 0.01:
            self.open[int(rng.integers(len(self.open)))].cancel()
        tokens = sum(len(event.tokens) for event in self.engine.step())
        self.ended += sum(request.finish_reason is not None for request in self.open)
        self.open = [request for request in self.open if request.finish_reason is None]
        return tokens


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_memory_stays_flat_and_nothing_compiles():
    traffic, compiled = Traffic(0), []
    traffic.engine.warm_up()
    own = dkv.diffkv(1.4, 0.3, queries=16, **WINDOW)
    traffic.engine.submit([1], policy=own, sampling="sample")  # what submitting needs itself
    list(traffic.engine.run())
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    tokens = sum(traffic.step() for _ in range(300))
    steps, began, before, parks = 0, time.monotonic(), resident(), 0
    while time.monotonic() - began < 60 * MINUTES or steps < 300:
        tokens, steps = tokens + traffic.step(), steps + 1
        parks = max([parks, *(request.parks for request in traffic.open)])
    grown = resident() - before
    for request in traffic.open:
        request.cancel()
    traffic.engine.step()
    check_pool_whole(traffic.engine)
    assert compiled == [], f"{len(compiled)} programs in {steps} steps"
    jax.jit(lambda x: x + MINUTES)(1)
    assert compiled, "the listener hears nothing"
    assert traffic.ended > 50 and tokens > 2000 and parks > 0
    assert grown < 32 * 2**20, f"{grown} bytes more after {steps} steps, {DIFFKV.name}"
    jax.monitoring.clear_event_listeners()
