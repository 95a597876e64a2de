"""Log-probabilities of generated tokens and of the likeliest ones beside them, from the logits that
the sampler drew from.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

MOST = 20  # likeliest tokens that are told for each token


class Logprobs(NamedTuple):
    """Of R rows and as many steps as there is room for, W; K = min(MOST, vocabulary)."""

    chosen: Array  # float32 [R, W]
    top_ids: Array  # int32 [R, W, K]
    top: Array  # float32 [R, W, K]


def room(requests: int, vocab: int, steps: int) -> Logprobs:
    """Zeros for so many."""
    shape = (requests, steps, min(MOST, vocab))
    zeros = jnp.zeros(shape, jnp.float32)
    return Logprobs(zeros[..., 0], jnp.zeros(shape, jnp.int32), zeros)


def noted(kept: Logprobs, logits: Array, drawn: Array, step: Array, told: Array) -> Logprobs:
    """`kept` with those of the token `drawn` int32 [R] at `step` int32 [] from `logits` float32 [R,
    vocab]; nothing is computed where no row is `told` bool [R].
    """

    def note() -> Logprobs:
        found = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(found, jnp.maximum(drawn, 0)[:, None], axis=1)[:, 0]
        top, ids = lax.top_k(found, kept.top.shape[-1])
        new = Logprobs(chosen, ids.astype(jnp.int32), top)
        return jax.tree.map(lambda old, x: old.at[:, step].set(x), kept, new)

    return lax.cond(told.any(), note, lambda: kept)
