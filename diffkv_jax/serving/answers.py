"""What steps tell of requests: tokens into text, log-probabilities, ends."""

from time import perf_counter
from typing import Any

import numpy as np

from diffkv_jax.serving.request import FINISHED, Event, Request, TokenLogprob


class Answers:
    """Collects the events of a step, one a request."""

    def __init__(self) -> None:
        self._events: dict[Request, Event] = {}

    def events(self) -> list[Event]:
        """Those since the last call."""
        found = list(self._events.values())
        self._events = {}
        return found

    def add(self, request: Request, tokens: np.ndarray, told: Any, reason: str | None) -> None:
        """Tokens that a request has drawn; `told` are its rows of `Logprobs`, `reason` why it has
        ended. A stop string may end it before the last of them.
        """
        if len(tokens) and not request.tokens:
            request.times["first"] = perf_counter()
        text, new, logprobs = "", [], []
        for i, token in enumerate(tokens.tolist()):
            new.append(token)
            if request.top_logprobs is not None:
                logprobs.append(_logprob(token, i, told, request.top_logprobs))
            is_end = reason == "eos" and i == len(tokens) - 1
            if request.words is not None and not is_end:
                text += request.words.take(token)
                if request.words.stopped:
                    reason = "stop"
                    break
        request.tokens += new
        request.logprobs += logprobs
        self._tell(Event(request, tuple(new), text, tuple(logprobs), None))
        if reason is not None:
            self.finish(request, reason)

    def finish(self, request: Request, reason: str) -> None:
        """End a request."""
        text = "" if request.words is None else request.words.end()
        request.finish_reason, request.state = reason, FINISHED
        request.times["end"] = perf_counter()
        self._tell(Event(request, (), text, (), reason))

    def _tell(self, event: Event) -> None:
        before = self._events.get(event.request)
        if before is not None:
            event = Event(
                event.request,
                before.tokens + event.tokens,
                before.text + event.text,
                before.logprobs + event.logprobs,
                event.finish_reason,
            )
        if event.tokens or event.text or event.finish_reason:
            self._events[event.request] = event


def _logprob(token: int, i: int, told: Any, count: int) -> TokenLogprob:
    chosen, ids, top = (x[i] for x in told)
    pairs = zip(ids[:count].tolist(), top[:count].tolist(), strict=True)
    return TokenLogprob(token, float(chosen), tuple(pairs))
