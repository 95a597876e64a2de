"""Choosing the next token: greedy, or temperature with top-k, top-p and min-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True)
class Greedy:
    """The most likely token, the lowest id of equals."""


@dataclass(frozen=True)
class Sample:
    """A draw from `softmax(logits / temperature)`, restricted in this order (as in Hugging Face's generation_config) to the `top_k` most
    likely tokens (ties included), the smallest set of probability `top_p`, and those of at least `min_p` times the most likely one's
    probability.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self):
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be positive and finite; use Greedy() for 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None for no limit")
        for field in ("top_p", "min_p"):
            value = getattr(self, field)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{field}={value} must lie in (0, 1], or be None for no limit")


def next_token(sampling: Greedy | Sample, logits: Array, keys: Array) -> Array:
    """Token ids int32 [R] from `logits [R, vocab]`; `keys [R]` one random key a request, so that a row draws the same alone."""
    if isinstance(sampling, Greedy):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = _restrict(sampling, logits / sampling.temperature)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _restrict(sampling: Sample, logits: Array) -> Array:
    """`logits [R, vocab]` with the tokens outside the allowed set at -inf."""
    if sampling.top_k is not None:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p is not None:
        descending = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        weights = jnp.exp(descending - descending[..., :1])
        mass = jnp.cumsum(weights, axis=-1)  # its last, not a sum: how XLA adds up a row on a CPU differs with the number of rows
        least = jnp.where(mass - weights < sampling.top_p * mass[..., -1:], descending, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p is not None:
        logits = jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits
