"""Metrics of an engine for Prometheus."""

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from diffkv_jax.serving import Event, Request

STATES = ("waiting", "reading", "running", "parked")
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """In a registry of its own; `step` is called by the thread that steps."""

    def __init__(self) -> None:
        self.registry = of = CollectorRegistry()
        self._requests = Gauge(
            "diffkv_requests", "Requests that have not finished", ["state"], registry=of
        )
        self._pages = Gauge("diffkv_pages", "Pages of the pool", ["state"], registry=of)
        self._prompt = Counter(
            "diffkv_prompt_tokens", "Tokens of prompts that were read", registry=of
        )
        self._generated = Counter("diffkv_generated_tokens", "Generated tokens", registry=of)
        self._finished = Counter(
            "diffkv_finished_requests", "Requests that have finished", ["reason"], registry=of
        )
        self._first = Histogram(
            "diffkv_time_to_first_token_seconds",
            "From submission to the first token",
            buckets=FIRST,
            registry=of,
        )
        self._each = Histogram(
            "diffkv_time_per_token_seconds",
            "Between tokens after the first, a mean of each request",
            buckets=EACH,
            registry=of,
        )
        self._parks = _Parks()
        of.register(self._parks)
        self._begun: set[Request] = set()

    def step(self, events: Sequence[Event], stats: dict[str, Any]) -> None:
        """After a step: its events, and `Engine.stats`."""
        for event in events:
            self._take(event)
        for state in STATES:
            count = sum(one["state"] == state for one in stats["requests"])
            self._requests.labels(state).set(count)
        for state in ("free", "held"):
            self._pages.labels(state).set(stats["pool"][state])
        self._parks.open = sum(one["parks"] for one in stats["requests"])

    def _take(self, event: Event) -> None:
        request, times = event.request, event.request.times
        self._generated.inc(len(event.tokens))
        if event.tokens and request not in self._begun:
            self._begun.add(request)
            self._prompt.inc(len(request.prompt))
            self._first.observe(times["first"] - times["submitted"])
        if event.finish_reason is None:
            return
        self._begun.discard(request)
        self._finished.labels(event.finish_reason).inc()
        self._parks.ended += request.parks
        if len(request.tokens) > 1:
            self._each.observe((times["end"] - times["first"]) / (len(request.tokens) - 1))

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class _Parks(Collector):
    """How often requests were parked: each has its own count."""

    def __init__(self) -> None:
        self.open = self.ended = 0

    def collect(self) -> Iterator[CounterMetricFamily]:
        name, told = "diffkv_parks", "Times that a request was put aside for want of pages"
        yield CounterMetricFamily(name, told, value=self.open + self.ended)
