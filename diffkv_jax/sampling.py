"""The next token: greedy, or temperature with top-k, top-p, min-p; a row of numbers a request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.arguments import integer, number


@dataclass(frozen=True)
class Greedy:
    """The most likely token, the lowest id of equals."""


@dataclass(frozen=True)
class Sample:
    """A draw from `softmax(logits / temperature)`, restricted in this order (as in Hugging Face's
    generation_config) to the `top_k` most likely tokens (ties included), the smallest set of
    probability `top_p`, and those of at least `min_p` times the most likely one's probability.

    Raises:
        TypeError, ValueError: a value is no number, or out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        checked = {
            "temperature": number(
                "temperature",
                self.temperature,
                above=0,
                rule="positive and finite; use Greedy() for 0",
            ),
            "top_k": integer("top_k", self.top_k, least=1, most=None, optional=True),
            "top_p": number("top_p", self.top_p, above=0, most=1, optional=True),
            "min_p": number("min_p", self.min_p, above=0, most=1, optional=True),
        }
        for field, value in checked.items():
            object.__setattr__(self, field, value)


class Rules(NamedTuple):
    """How each of R requests draws: data, so that another value compiles nothing."""

    temperature: Array  # float32 [R]; 0: the most likely token
    top_k: Array  # int32 [R]; beyond the vocabulary: no limit
    top_p: Array  # float32 [R]; 1: no limit
    min_p: Array  # float32 [R]; 0: no limit


def rules(samplings: Sequence[Greedy | Sample]) -> Rules:
    """One entry a request."""
    most = np.iinfo(np.int32).max
    rows = [
        (0.0, most, 1.0, 0.0)
        if isinstance(one, Greedy)
        else (one.temperature, min(one.top_k or most, most), one.top_p or 1.0, one.min_p or 0.0)
        for one in samplings
    ]
    columns = zip(Rules._fields, zip(*rows, strict=True), strict=True)
    kinds = {"top_k": np.int32}
    return Rules(*(jnp.asarray(np.asarray(x, kinds.get(name, np.float32))) for name, x in columns))


def next_token(rules: Rules, logits: Array, keys: Array) -> Array:
    """Token ids int32 [R] from `logits` float32 [R, vocab]; `keys [R]` one random key a request, so
    that a row draws the same alone.
    """
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    draws = rules.temperature > 0

    def draw() -> Array:
        relative = logits - logits.max(axis=-1, keepdims=True)  # else they could become infinite
        allowed = _allowed(rules, relative / jnp.where(draws, rules.temperature, 1)[:, None])
        drawn = jax.vmap(jax.random.categorical)(keys, allowed).astype(jnp.int32)
        return jnp.where(draws, drawn, best)

    return lax.cond(draws.any(), draw, lambda: best)


def _allowed(rules: Rules, logits: Array) -> Array:
    """`logits [R, vocab]` with the tokens outside the allowed set at -inf."""
    vocab = logits.shape[-1]

    def cut() -> Array:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        last = jnp.minimum(rules.top_k, vocab)[:, None] - 1
        kth = jnp.take_along_axis(descending, last, axis=-1)
        kept = jnp.where(descending < kth, -jnp.inf, descending)
        weights = jnp.exp(kept - kept[:, :1])
        # its last, not a sum: how XLA adds up a row on a CPU differs with the number of rows
        mass = jnp.cumsum(weights, axis=-1)
        top_p = rules.top_p[:, None]
        within = (mass - weights < top_p * mass[:, -1:]) | (top_p >= 1)
        least = jnp.where(within, kept, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where(logits < jnp.maximum(least, kth), -jnp.inf, logits)

    limited = (rules.top_k < vocab) | (rules.top_p < 1)
    logits = lax.cond(limited.any(), cut, lambda: logits)
    least = logits.max(axis=-1) + jnp.log(rules.min_p)
    return jnp.where(logits < least[:, None], -jnp.inf, logits)
