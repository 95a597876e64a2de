"""The built-in calibration text, and its token ids as a model holds them."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from typing import Any

import numpy as np

from diffkv_jax.model import CausalLM

# passages are taken from these in turn
ORDER = (
    "english_prose python german chinese data french dialogue russian c english_verse japanese "
    "spanish web arabic italian arithmetic hindi portuguese"
).split()


@cache
def calibration_text() -> str:
    """About 35,000 characters in the public domain: prose, verse, code and data, passages of about
    twelve languages in turn (`calibration/text/README.md` names the sources).
    """
    folder = files("diffkv_jax") / "calibration" / "text"
    texts = ((folder / f"{name}.txt").read_text(encoding="utf-8") for name in ORDER)
    rounds = zip_longest(*(text.strip().split("\n%\n") for text in texts))
    return "\n\n".join(passage for one in rounds for passage in one if passage)


@dataclass(frozen=True, eq=False, repr=False)
class SampleText:
    """The built-in text as a tokenizer reads it.

    Attributes:
        ids: int32 [tokens], without special tokens.
        prefix: int32 [0 or 1], the token that every text begins with, if the tokenizer puts one.
    """

    ids: np.ndarray
    prefix: np.ndarray


def sample_text(tokenizer: Any, vocab_size: int) -> SampleText | None:
    """The built-in text in token ids; None without a tokenizer (a Hugging Face one), or where it
    has ids that the model does not know.
    """
    if tokenizer is None:
        return None
    text, options = calibration_text(), {"verbose": False}
    ids = np.asarray(tokenizer(text, add_special_tokens=False, **options).input_ids, np.int32)
    start = tokenizer(text[:1], **options).input_ids[:1]
    prefix = np.asarray(start if start == [tokenizer.bos_token_id] else [], np.int32)
    known = np.concatenate([ids, prefix]) < vocab_size
    return SampleText(ids, prefix) if ids.size and known.all() else None


def built_in_tokens(model: CausalLM, count: int, length: int) -> np.ndarray:
    """`count` sequences of `length` tokens of the built-in text, int32 [count, length], one after
    the other. As long as the model's context where that is shorter.

    Raises:
        ValueError: the model has no such text, or it is shorter.
    """
    text = getattr(model, "text", None)
    if not isinstance(text, SampleText):
        raise ValueError(
            "the model has no calibration text of its own (load_pretrained gives it one where the "
            "tokenizer is there): give tokens= [sequences, length]"
        )
    length = min(length, model.attention.max_position_embeddings)
    fresh = length - text.prefix.size
    if count < 1 or fresh < 1 or count * fresh > text.ids.size:
        raise ValueError(
            f"count={count} sequences of length={length} must be between one token and the "
            f"{text.ids.size} of the built-in text: take fewer or shorter ones, or give tokens="
        )
    rows = text.ids[: count * fresh].reshape(count, fresh)
    return np.concatenate([np.tile(text.prefix, (count, 1)), rows], axis=1)


def built_in_rows(model: CausalLM, length: int) -> np.ndarray:
    """As many sequences of `length` tokens as the built-in text has, int32 [count, length]; one of
    all its tokens where it has fewer.

    Raises:
        ValueError: the model has no such text.
    """
    text = getattr(model, "text", None)
    if not isinstance(text, SampleText):
        return built_in_tokens(model, 1, length)  # which says so
    length = min(length, text.ids.size + text.prefix.size)
    count = text.ids.size // max(length - text.prefix.size, 1)
    return built_in_tokens(model, count, length)
