"""What a model call does to the cache: one decode step or one prompt chunk. Passed through the
model to `attend`.
"""

from dataclasses import dataclass
from functools import partial

import jax
from jax import Array


@partial(jax.tree_util.register_dataclass, data_fields=["active"], meta_fields=[])
@dataclass(frozen=True)
class DecodeStep:
    """One new token for each request that is `active` (bool [R]); the others neither append nor
    score.
    """

    active: Array


@partial(jax.tree_util.register_dataclass, data_fields=["length", "compress"], meta_fields=[])
@dataclass(frozen=True)
class PrefillStep:
    """A right-aligned prompt chunk: `length` int32 [R] tokens at its end.

    With `compress` (bool []) its last rows score every token and the policy runs; without, tokens
    that leave the window enter the high tier unscored. True for the last chunk of a prompt, and
    earlier when the pool runs low.
    """

    length: Array
    compress: Array


@partial(jax.tree_util.register_dataclass, data_fields=["length", "first"], meta_fields=[])
@dataclass(frozen=True)
class ScoreStep:
    """A right-aligned chunk that has `length` int32 [R] tokens at its end and goes over part of the
    prompt again: it attends and scores the prompt's tokens from position `first` int32 [] on
    (`Score.score_pass`). None of its own tokens is stored.
    """

    length: Array
    first: Array
