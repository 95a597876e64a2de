"""What page and metrics tell of an engine: kept by the thread that steps, read by others."""

import threading
from collections import deque
from collections.abc import Sequence
from time import monotonic
from typing import Any

from diffkv_jax.server.metrics import Metrics
from diffkv_jax.serving import Engine, Event

SECONDS = 180  # of tokens a second
SHOWN = 200  # most requests that are listed
EVERY = 1.0  # seconds between two counts of pages by head
STALE = 5.0  # seconds without a reader, after which pages are not counted by head any more


class Watch:
    """Call it with the events of each step, in the thread that steps."""

    def __init__(self, engine: Engine, metrics: Metrics):
        self._engine, self._metrics = engine, metrics
        self._lock = threading.Lock()  # of all below
        self._snapshot = engine.stats()
        self._heads: list[list[float]] | None = None
        self._heads_at = self._asked_at = float("-inf")
        self._rates: deque[tuple[int, int]] = deque(maxlen=SECONDS)  # (second, tokens)
        self._tokens = 0

    def __call__(self, events: Sequence[Event]) -> None:
        now = monotonic()
        heads = now - self._asked_at < STALE and now - self._heads_at >= EVERY
        found = self._engine.stats(heads=heads)
        self._metrics.step(events, found)
        with self._lock:
            if heads:
                self._heads, self._heads_at = found.pop("heads"), now
            self._snapshot = found
            self._count(int(now), sum(len(event.tokens) for event in events))

    def _count(self, second: int, tokens: int) -> None:
        self._tokens += tokens
        if self._rates and self._rates[-1][0] == second:
            tokens += self._rates.pop()[1]
        self._rates.append((second, tokens))

    def stats(self, num_open: int) -> dict[str, Any]:
        """As JSON for the page, with `num_open` requests that have not finished; those that came
        during a step wait. `rates`: tokens of each of the last `SECONDS` whole seconds;
        `heads`: pages by layer and KV head, a mean over requests that decode.
        """
        now = monotonic()
        with self._lock:
            self._asked_at = now
            counted = dict(self._rates)
            requests = self._snapshot["requests"]
            states: dict[str, int] = {}
            for one in requests:
                states[one["state"]] = states.get(one["state"], 0) + 1
            if (later := num_open - len(requests)) > 0:
                states["waiting"] = states.get("waiting", 0) + later
            return {
                "open": num_open,
                "states": states,
                "requests": requests[:SHOWN],
                "pool": self._snapshot["pool"],
                "generated": self._tokens,
                "rates": [counted.get(s, 0) for s in range(int(now) - SECONDS, int(now))],
                "heads": self._heads if "running" in states else None,
            }
