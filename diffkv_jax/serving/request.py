"""A request of the engine, as its user holds it, and what a step tells of it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.sampling import Greedy, Sample
from diffkv_jax.serving.penalties import Penalties
from diffkv_jax.serving.text import Words

WAITING, READING, RUNNING, PARKED, FINISHED = "waiting", "reading", "running", "parked", "finished"


class TokenLogprob(NamedTuple):
    """Of one generated token: natural logarithms, from the logits that it was drawn from."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, as many as asked for


class Event(NamedTuple):
    """What a step adds to a request."""

    request: "Request"
    tokens: tuple[int, ...]
    text: str  # "" without a tokenizer
    logprobs: tuple[TokenLogprob, ...]  # one a token where they were asked for
    finish_reason: str | None  # as `Request.finish_reason`


@dataclass(eq=False)
class Request:
    """What `Engine.submit` returns; `Engine.step` changes it.

    Attributes:
        prompt: int32 [N].
        tokens: what was generated so far, an id that ended it included.
        text: its text, without a stop string; "" without a tokenizer.
        logprobs: one a token, where they were asked for.
        finish_reason: None until it ends: "eos"; "stop" (a stop string); "length"; "cache_full"
            (the pool cannot hold it even alone); "error" (logits that are not finite); "cancelled".
        state: "waiting", "reading", "running", "parked" or "finished".
        times: seconds of `time.perf_counter` when it was submitted, gave its first token, ended.
    """

    number: int
    prompt: np.ndarray
    max_new_tokens: int
    sampling: Greedy | Sample
    seed: Any  # a number or a random key
    key: np.ndarray  # data of a random key
    stop_token_ids: np.ndarray  # int32 [STOPS]
    top_logprobs: int | None
    penalties: Penalties
    policy: CompressionPolicy | None  # bound; None: the engine's
    priority: int
    words: Words | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    state: str = WAITING
    cancelled: bool = False
    parks: int = 0
    times: dict[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "" if self.words is None else self.words.text

    @property
    def seq_len(self) -> int:
        """Tokens that the model has seen once the last generated one is fed."""
        return len(self.prompt) + len(self.tokens)

    def cancel(self) -> None:
        """End it at the next step, with "cancelled" and its pages free; of a finished one nothing
        changes.
        """
        self.cancelled = True

    def __repr__(self) -> str:
        done = self.finish_reason or self.state
        return f"Request({self.number}, {len(self.prompt)} + {len(self.tokens)} tokens, {done})"
