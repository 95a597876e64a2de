"""What is taken from, or added to, logits before a token is drawn: data, a row a request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.arguments import integer, number, refuse
from diffkv_jax.decode_loop import State
from diffkv_jax.pallas_kernels.precision import in_32_bits

BIASES = 300  # tokens of one request, as OpenAI has it
_finite = partial(number, least=-100, most=100)


@dataclass(frozen=True)
class Penalties:
    """How a request's logits are changed, in this order, before temperature and cuts.

    Attributes:
        bias: by token id, added to its logit; at most 300, from -100 to 100.
        repetition: of every token of prompt or answer a positive logit is divided by it, a negative
            one multiplied (CTRL, arXiv:1909.05858; transformers' `repetition_penalty`).
        frequency, presence: taken from a token's logit for each time that it is in the answer, and
            once if it is (as OpenAI's parameters of these names); from -2 to 2.

    Raises:
        TypeError, ValueError: a value is no number, or out of range.
    """

    bias: Mapping[int, float] = field(default_factory=dict)
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.bias, Mapping):
            refuse("bias", self.bias, "a mapping of token ids to numbers", True)
        if len(self.bias) > BIASES:
            refuse("bias", f"{len(self.bias)} tokens", f"of at most {BIASES}")
        ids = [integer("bias", i, least=0) for i in self.bias]
        found = {
            "bias": dict(zip(ids, (_finite("bias", x) for x in self.bias.values()), strict=True)),
            "repetition": number("repetition", self.repetition, above=0),
            "frequency": number("frequency", self.frequency, least=-2, most=2),
            "presence": number("presence", self.presence, least=-2, most=2),
        }
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def change(self) -> bool:
        """Whether any logit changes."""
        return bool(self.bias) or (self.repetition, self.frequency, self.presence) != (1, 0, 0)


NONE = Penalties()


class Changes(NamedTuple):
    """Of R requests."""

    bias_ids: Array  # int32 [R, BIASES], -1 for none
    bias: Array  # float32 [R, BIASES]
    repetition: Array  # float32 [R]
    frequency: Array  # float32 [R]
    presence: Array  # float32 [R]
    history: Array  # int32 [R, max_len] tokens so far, -1 behind them
    prompt_len: Array  # int32 [R]


def changes(given: Sequence[tuple[Penalties, list[int], list[int]]], width: int) -> Changes:
    """Of penalties, prompt and answer of each request, with room for `width` tokens."""
    ids, bias = np.full((len(given), BIASES), -1, np.int32), np.zeros((len(given), BIASES))
    history = np.full((len(given), width), -1, np.int32)
    for row, (penalties, prompt, answer) in enumerate(given):
        ids[row, : len(penalties.bias)] = list(penalties.bias)
        bias[row, : len(penalties.bias)] = list(penalties.bias.values())
        if penalties.change:
            history[row, : len(prompt) + len(answer)] = prompt + answer

    def column(name: str) -> Array:
        return jnp.array([getattr(penalties, name) for penalties, *_ in given], jnp.float32)

    return Changes(
        bias_ids=jnp.asarray(ids),
        bias=jnp.asarray(bias, jnp.float32),
        repetition=column("repetition"),
        frequency=column("frequency"),
        presence=column("presence"),
        history=jnp.asarray(history),
        prompt_len=jnp.array([len(prompt) for _, prompt, _ in given], jnp.int32),
    )


@in_32_bits
def changed(what: Changes, logits: Array, state: State) -> Array:
    """`logits` float32 [R, vocab] for the next token behind history and `state`; untouched rows,
    and all where nobody asks for it, keep their bits.
    """
    rows, vocab = jnp.arange(len(logits))[:, None], logits.shape[1]

    def count(tokens: Array, where: Array) -> Array:
        ids = jnp.where(where, tokens, vocab)
        return jnp.zeros_like(logits).at[rows, ids].add(1, mode="drop")

    def change() -> Array:
        ids = jnp.where(what.bias_ids < 0, vocab, what.bias_ids)
        found = logits.at[rows, ids].add(what.bias, mode="drop")
        there, place = what.history >= 0, jnp.arange(what.history.shape[1])
        of_prompt = there & (place < what.prompt_len[:, None])
        drawn = jnp.arange(state.tokens.shape[1]) < state.lengths[:, None]
        answer = count(what.history, there & ~of_prompt) + count(state.tokens, drawn)
        seen = (count(what.history, of_prompt) + answer) > 0
        repetition = what.repetition[:, None]
        repeated = jnp.where(found > 0, found / repetition, found * repetition)
        found = jnp.where(seen, repeated, found)
        found -= what.frequency[:, None] * answer
        return found - jnp.where(answer > 0, what.presence[:, None], 0)

    asked = (what.history >= 0).any() | (what.bias_ids >= 0).any()
    return lax.cond(asked, change, lambda: logits)
