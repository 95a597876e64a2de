"""Classes of tokens by id: those that always stay, and punctuation, which heads may choose to keep
(FastGen).
"""

import dataclasses
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from diffkv_jax.arguments import WrongType, shown, token_ids
from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import per_head

SPECIAL, PUNCTUATION = 1, 2  # values of `KVCache.classes`; 0 is any other token


class _Classes(NamedTuple):
    special: tuple[int, ...]
    punctuation: tuple[int, ...]


class TokenClasses(_Classes):
    """Ids for `CompressionPolicy.protect` and `.punctuation`: (special, punctuation).

    Raises:
        TypeError, ValueError: one of them is no list of token ids.
    """

    def __new__(cls, special: Sequence[int], punctuation: Sequence[int]) -> "TokenClasses":
        return super().__new__(
            cls, token_ids("special", special), token_ids("punctuation", punctuation)
        )


def token_classes(tokenizer: Any) -> TokenClasses:
    """The ids of a Hugging Face tokenizer's special tokens, and of tokens that are ASCII
    punctuation but for a space before it.

    Raises:
        TypeError: it is no such tokenizer.
    """
    if not all(
        hasattr(tokenizer, name) for name in ("all_special_ids", "convert_ids_to_tokens", "__len__")
    ):
        raise WrongType(
            f"tokenizer={shown(tokenizer)} must be a Hugging Face tokenizer, such as "
            f"load_pretrained returns"
        )
    special = {int(i) for i in tokenizer.all_special_ids}
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    marks = ((i, (piece or "").lstrip("Ġ▁ ")) for i, piece in enumerate(pieces))
    return TokenClasses(
        tuple(sorted(special)),
        tuple(
            i
            for i, mark in marks
            if mark and set(mark) <= set(string.punctuation) and i not in special
        ),
    )


def note_classes(cache: KVCache, tokens: Array, positions: Array) -> KVCache:
    """The cache that knows the classes of `tokens` int32 [R, T] at `positions` int32 [R, T], -1
    where there is none.
    """
    selection = cache.spec.selection
    if not selection.classed:
        return cache
    special, marks = (
        jnp.isin(tokens, jnp.asarray(ids, jnp.int32))
        for ids in (selection.protect, selection.punctuation)
    )
    found = jnp.where(special, SPECIAL, jnp.where(marks, PUNCTUATION, 0)).astype(
        cache.classes.dtype
    )
    at = jnp.where(positions >= 0, positions, cache.spec.max_len)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return dataclasses.replace(cache, classes=cache.classes.at[rows, at].set(found, mode="drop"))


def classes_at(cache: KVCache, position: Array) -> Array:
    """Class of the tokens of each head at `position` int32 [B, n], or of all layers' heads; sinks
    count as special.
    """
    selection = cache.spec.selection
    found = jnp.zeros(position.shape, jnp.uint8)
    if selection.classed:
        known = per_head(cache, cache.classes, position.shape[0] // cache.spec.num_heads)
        found = jnp.take_along_axis(known, jnp.clip(position, 0, cache.spec.max_len - 1), axis=1)
    return jnp.where(position < selection.sinks, jnp.uint8(SPECIAL), found)


def protected_tokens(cache: KVCache, position: Array) -> Array | None:
    """Which tokens of each head at `position` int32 [B, n] always stay, bool; None: the policy
    protects none, or heads choose.
    """
    selection = cache.spec.selection
    if selection.profiled or not (selection.sinks or selection.protect):
        return None
    return classes_at(cache, position) == SPECIAL
