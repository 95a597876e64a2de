"""`Protect`: tokens that always stay; and classes of tokens by id."""

import string
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from diffkv_jax.arguments import WrongType, integer, shown, token_ids
from diffkv_jax.policy.fields import MOST_TOKENS
from diffkv_jax.policy.stage import Stage, static


class Protect(Stage):
    """Tokens that always stay.

    Attributes:
        sinks: the first tokens of a request.
        token_ids: tokens with these ids, such as the special ones of `diffkv_jax.token_classes`.
    """

    sinks: int = static(default=0, convert=partial(integer, least=0, most=MOST_TOKENS), length=True)
    token_ids: tuple[int, ...] = static(default=(), convert=token_ids)


class _Classes(NamedTuple):
    special: tuple[int, ...]
    punctuation: tuple[int, ...]


class TokenClasses(_Classes):
    """Ids for `Protect.token_ids` and FastGen's `punctuation`: (special, punctuation).

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
