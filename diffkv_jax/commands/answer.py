"""One request of an engine to its end, with its text as it comes."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any


@dataclass
class Answer:
    """What came of a request.

    Attributes:
        request: of the engine, finished.
        first, seconds: until its first token (None where none came) and its end, compilation
            included.
        speed: tokens a second after the first step of decoding, which is when it is compiled; None
            where it ended before.
        memory: `MemoryReport` of the cache as it was last seen; None where it ended at once.
    """

    request: Any
    first: float | None
    seconds: float
    speed: float | None
    memory: Any

    def line(self) -> str:
        """Speed and memory for people."""
        import humanize

        speed = "" if self.speed is None else f", {self.speed:.1f} tokens/s"
        first = "" if self.first is None else f", first after {self.first:.1f} s"
        said = f"{len(self.request.tokens)} tokens ({self.request.finish_reason}){speed}{first}"
        said += f"; {len(self.request.prompt)} prompt tokens"
        if self.memory is None:
            return said
        held, plain = (
            humanize.naturalsize(amount, binary=True)
            for amount in (self.memory.allocated, self.memory.bf16)
        )
        share = self.memory.allocated / max(self.memory.bf16, 1)
        if share > 1:  # a short text leaves most of the window empty
            return f"{said}; cache {held}, its exact recent window for the most part; bf16 {plain}"
        return f"{said}; cache {held}, {share:.0%} of {plain} in bf16"

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        memory = self.memory
        return {
            "text": self.request.text,
            "tokens": list(map(int, self.request.tokens)),
            "finish_reason": self.request.finish_reason,
            "prompt_tokens": len(self.request.prompt),
            "new_tokens": len(self.request.tokens),
            "seed": int(self.request.seed),
            "seconds": self.seconds,
            "seconds_to_first_token": self.first,
            "tokens_per_second": self.speed,
            "cache_bytes": None if memory is None else memory.allocated,
            "bf16_bytes": None if memory is None else memory.bf16,
        }


def answered(
    engine: Any, prompt: Any, show: Callable[[str], None], *, memory: bool = True, **asked: Any
) -> Answer:
    """Submit `prompt` with what is `asked` and step until it ends; Ctrl-C ends it with "cancelled".

    Raises:
        TypeError, ValueError: bad input, named, or more than the engine can hold.
    """
    began, shown, seen, first = perf_counter(), 0, None, None
    warm = None  # when everything had been compiled, and the tokens by then
    request = engine.submit(prompt, **asked)
    try:
        while request.finish_reason is None:
            engine.step()
            if request.tokens and first is None:
                first, warm = request.times["first"] - began, (perf_counter(), len(request.tokens))
            show(request.text[shown:])
            shown = len(request.text)
            seen = (memory and engine.memory_report()) or seen
    except KeyboardInterrupt:
        request.cancel()
        while request.finish_reason is None:
            engine.step()
    show(request.text[shown:])
    ended, speed = perf_counter(), None
    if warm is not None and len(request.tokens) > warm[1]:
        speed = (len(request.tokens) - warm[1]) / max(ended - warm[0], 1e-9)
    return Answer(request, first, ended - began, speed, seen)
