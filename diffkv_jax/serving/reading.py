"""A prompt on its way into the pool: the parts that it is read in, one program call each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jax import Array

from diffkv_jax.batching import chunks
from diffkv_jax.policy.score import Score
from diffkv_jax.serving.request import Request
from diffkv_jax.serving.rows import Rows


class Part(NamedTuple):
    """A chunk of the prompt, a pass that goes over it again, or the event after the passes."""

    kind: Literal["chunk", "pass", "event"]
    tokens: np.ndarray  # int32 [1, C] right-aligned
    length: np.ndarray  # int32 [1] real ones
    last: bool = False  # of the prompt's chunks
    first: int = 0  # of a pass: position from which on tokens are scored

    @property
    def together(self) -> tuple:
        """Chunks that are equal in this can go in one call."""
        return self.kind, self.tokens.shape[1], self.last


@dataclass(eq=False)
class Reading:
    """A request whose prompt is being read, and its row."""

    request: Request
    row: Rows
    parts: list[Part]  # still to come
    pages: int = 0  # held
    logits: Array | None = None  # [1, vocab] of the prompt's last token
    overflow: bool = False

    @property
    def tokens(self) -> int:
        """Of the prompt, that were read."""
        return len(self.request.prompt) - sum(
            int(part.length[0]) for part in self.parts if part.kind == "chunk"
        )


def pieces_of(prompt: np.ndarray, size: int, score: Score | None) -> Iterator[Part]:
    """How `read_prompts` reads a prompt int32 [N] in chunks of `size`."""
    tokens, length = prompt[None], np.array([len(prompt)], np.int32)
    for part, real, last in chunks(tokens, length, size):
        yield Part("chunk", part, real, last)
    if score is not None and score.has_passes:
        for part, real, first in score.passes(tokens, length):
            yield Part("pass", part, real, first=first)
        yield Part("event", tokens[:, :0], length * 0)
