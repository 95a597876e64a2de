"""What a run of requests came to: throughput and latencies from the times of their tokens."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Served:
    """One request: when it came and when each of its tokens did, seconds."""

    came: float
    tokens: list[float] = field(default_factory=list)


@dataclass
class Run:
    """A system that served all requests of a workload.

    Attributes:
        seconds: wall time.
        at_once: requests that decode at once, a step of the system each.
        scheduling: share of the busy time that is not spent in device calls, where known.
    """

    served: list[Served]
    seconds: float
    at_once: list[int]
    scheduling: float | None = None
    parks: int = 0

    def row(self) -> dict[str, float]:
        """Tokens a second, and medians and 99th percentiles in milliseconds."""
        self.served = [one for one in self.served if one.tokens]
        first = [1e3 * (one.tokens[0] - one.came) for one in self.served]
        # tokens of one call come together: what a reader waits for is the next of them
        gaps = np.concatenate([1e3 * np.diff(np.unique(one.tokens)) for one in self.served])
        each = [1e3 * (s.tokens[-1] - s.tokens[0]) / max(len(s.tokens) - 1, 1) for s in self.served]
        total = sum(len(one.tokens) for one in self.served)
        return {
            "tokens/s": total / self.seconds,
            "sustained": self.sustained(),
            "at once": float(np.mean(self.at_once)),
            "first p50": float(np.median(first)),
            "first p99": float(np.percentile(first, 99)),
            "a token p50": float(np.median(each)),
            "a token p99": float(np.percentile(each, 99)),
            "gap p50": float(np.median(gaps)),
            "gap p99": float(np.percentile(gaps, 99)),
            "scheduler": 0.0 if self.scheduling is None else 100 * self.scheduling,
            "parks": float(self.parks),
        }

    def sustained(self) -> float:
        """Tokens a second in the middle half of the tokens, prompts that are read then included:
        without filling up and running dry.
        """
        times = np.sort(np.concatenate([one.tokens for one in self.served]))
        first, last = len(times) // 4, 3 * len(times) // 4
        return (last - first) / max(times[last] - times[first], 1e-9)
