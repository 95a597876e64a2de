"""The engine under a workload."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.serving.measured import Run, Served
from benchmarks.serving.workload import Arrival
from diffkv_jax.serving.engine import Engine

CALLS = ("read", "decode", "first_token", "seat", "free_slots", "narrow", "forget", "retry")


def serve(loaded: tuple, policy: Any, workload: Sequence[Arrival], **options: Any) -> Run:
    """All requests of a workload; programs are compiled by one like it first."""
    model, params, tokenizer = loaded
    engine = Engine(model, params, tokenizer=tokenizer, policy=policy, **options)
    _warm_up(engine, workload)
    waits = _Waits(engine._scheduler.slots)
    served, at_once, coming, idle = {}, [], list(workload), 0.0
    began = time.perf_counter()
    while coming or engine.busy:
        now = time.perf_counter() - began
        while coming and coming[0].seconds <= now:
            one = coming.pop(0)
            how = {"max_new_tokens": one.new_tokens, "stop_token_ids": ()}
            served[engine.submit(one.prompt, **how)] = Served(began + one.seconds)
        if not engine.busy:
            time.sleep(min(coming[0].seconds - now, 0.05))
            idle += time.perf_counter() - began - now
            continue
        for event in engine.step():
            served[event.request].tokens += [time.perf_counter()] * len(event.tokens)
        at_once.append(len(engine._scheduler.slots.running))
    seconds = time.perf_counter() - began
    parks = sum(request.parks for request in served)
    scheduling = 1 - waits.seconds / (seconds - idle)
    return Run(list(served.values()), seconds, at_once, scheduling, parks)


def _warm_up(engine: Engine, workload: Sequence[Arrival]) -> None:
    """Every program that the workload needs: decoding of as many requests as there are slots."""
    width, slots = 1, engine._scheduler.slots
    while width <= slots.most:
        for one in itertools.islice(itertools.cycle(workload), width):
            engine.submit(one.prompt[:300], max_new_tokens=12, stop_token_ids=())
        list(engine.run())
        width = width + 1 if width == slots.most else min(2 * width, slots.most)
    engine._scheduler.estimate.__post_init__()
    engine._scheduler.estimate.used = 1.0


class _Waits:
    """Seconds in calls of the slots, which wait for the device."""

    def __init__(self, slots: Any):
        self.seconds = 0.0
        for name in CALLS:
            setattr(slots, name, self._timed(getattr(slots, name)))

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed
