"""The engine under a workload."""

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.serving.measured import Run, Served
from benchmarks.serving.workload import Arrival
from diffkv_jax.serving.engine import Engine

CALLS = (
    "read",
    "decode",
    "first_token",
    "seat",
    "free_slots",
    "narrow",
    "forget",
    "retry",
    "park",
    "unpark",
)


def serve(loaded: tuple, policy: Any, workload: Sequence[Arrival], **options: Any) -> Run:
    """All requests of a workload; programs are compiled by one like it first."""
    model, params, tokenizer = loaded
    engine = Engine(model, params, tokenizer=tokenizer, policy=policy, **options)
    engine.warm_up()
    engine.submit(workload[0].prompt, max_new_tokens=1)  # passes of a score, which are as long
    list(engine.run())
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


class _Waits:
    """Seconds in calls of the slots, which wait for the device."""

    def __init__(self, slots: Any):
        self.seconds, self._inside = 0.0, False
        for name in CALLS:
            setattr(slots, name, self._timed(getattr(slots, name)))

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # another one that is timed
                return call(*args, **kwargs)
            began, self._inside = time.perf_counter(), True
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds, self._inside = self.seconds + time.perf_counter() - began, False

        return timed
