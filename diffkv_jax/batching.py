"""Prompts as users give them, checked and cut into right-aligned chunks. NumPy only."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffkv_jax.arguments import integer, shown
from diffkv_jax.model import AttentionSpec

MIN_CHUNK = 16
IDS = "token ids: tokenizer(text).input_ids makes them"


class Prompts(NamedTuple):
    """Prompts of R requests, right-padded."""

    tokens: np.ndarray  # int32 [R, N]
    lengths: np.ndarray  # int32 [R]
    rests: np.ndarray  # bool [R] requests that do nothing (None was given for them)


def as_batch(tokens: Any, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts as int32 [R, N] (right-padded) and lengths int32 [R].

    Raises:
        TypeError, ValueError: as `as_prompts`, or one is empty or None.
    """
    prompts = as_prompts(tokens, None, None, vocab_size)
    for i in np.flatnonzero(prompts.lengths == 0):
        raise ValueError(
            f"prompt {i} has length 0; it must hold at least one token (empty prompt?)"
        )
    return prompts.tokens, prompts.lengths


def as_prompts(tokens: Any, lengths: Any, attention_mask: Any, vocab_size: int) -> Prompts:
    """Prompts as the user gives them.

    Args:
        tokens: int [R, N], or a list with a list of token ids, a tokenizer's encoding, or None (the
            request rests) for each request; or a tokenizer's encoding of one text or of several,
            with its mask.
        lengths: int [R] of right-padded rows; None: all of a row.
        attention_mask: 0 or 1 in the shape of `tokens`, ones side by side; None: all ones, or that
            of the encoding.
        vocab_size: ids lie below.

    Raises:
        TypeError, ValueError: no request, lengths or a mask that do not fit, a token id outside the
            vocabulary, or not integers.
    """
    if isinstance(tokens, Mapping):
        tokens, attention_mask = _of_encoding(tokens, attention_mask)
        if _is_flat(tokens):
            tokens, attention_mask = [tokens], None if attention_mask is None else [attention_mask]
    rows = _rows(tokens)
    if not rows:
        raise ValueError("tokens must hold at least one request, given none")
    if attention_mask is not None and lengths is not None:
        raise ValueError(
            "give lengths= or attention_mask=, not both: each says which tokens of a row count"
        )
    masks = [None] * len(rows)
    if attention_mask is not None:
        masks = _rows(attention_mask, "attention_mask")
    if len(masks) != len(rows):
        raise ValueError(
            f"attention_mask has {len(masks)} rows, tokens have {len(rows)}; give a row of it for "
            "each prompt"
        )
    pairs = enumerate(zip(rows, masks, strict=True))
    found = [_ids(i, row, mask, vocab_size) for i, (row, mask) in pairs]
    if lengths is not None:
        found = _cut(found, lengths)
    for i, row in enumerate(found):
        _check_ids(i, row, vocab_size)
    batch = np.zeros((len(found), max(map(len, found))), np.int32)
    for i, row in enumerate(found):
        batch[i, : len(row)] = row
    sizes = np.array([len(row) for row in found], np.int32)
    return Prompts(batch, sizes, np.array([row is None for row in rows]))


def _of_encoding(encoding: Mapping, mask: Any) -> tuple[Any, Any]:
    """Ids and mask of what a tokenizer returns; a given mask wins."""
    if "input_ids" not in encoding:
        raise ValueError(
            f"tokens is a mapping with {sorted(map(str, encoding))} and without 'input_ids': give "
            f"{IDS}"
        )
    return encoding["input_ids"], encoding.get("attention_mask") if mask is None else mask


def _is_flat(tokens: Any) -> bool:
    """Whether these are the ids of one text."""
    if hasattr(tokens, "ndim"):
        return tokens.ndim == 1
    return isinstance(tokens, Sequence) and all(isinstance(i, int | np.integer) for i in tokens)


def _rows(tokens: Any, name: str = "tokens") -> list:
    """The rows of a list or of an array [R, N]."""
    if hasattr(tokens, "shape"):
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[0] == 0:
            raise ValueError(
                f"{name} must be [requests, length] with at least one request, given shape "
                f"{tokens.shape}"
            )
        return list(_integers(tokens, name))
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence):
        raise TypeError(f"{name}={shown(tokens)} must be a list of prompts, each a list of {IDS}")
    return list(tokens)


def _ids(i: int, row: Any, mask: Any, vocab_size: int) -> np.ndarray:
    """The ids of one prompt, int [n], those that its mask keeps."""
    if isinstance(row, Mapping):
        row, mask = _of_encoding(row, mask)
        row, mask = _single(row), _single(mask)
    ids = _flat(i, [] if row is None else row)
    if mask is None:
        return ids
    keeps = _flat(i, mask, "attention_mask")
    if len(keeps) != len(ids) or not np.isin(keeps, (0, 1)).all():
        raise ValueError(
            f"attention_mask of prompt {i} must be 0 or 1 for each of its {len(ids)} tokens, given "
            f"{shown(keeps.tolist())}"
        )
    kept = np.flatnonzero(keeps)
    if len(kept) and kept[-1] - kept[0] + 1 != len(kept):
        raise ValueError(
            f"attention_mask of prompt {i} leaves out tokens in the middle: "
            f"{shown(keeps.tolist())}; pad left or right"
        )
    return ids[kept]


def _single(rows: Any) -> Any:
    """The row of a batch of one, anything else as it is."""
    try:
        return rows[0] if np.ndim(rows) == 2 and len(rows) == 1 else rows
    except Exception:  # lists of unequal lengths, which `_flat` refuses
        return rows


def _flat(i: int, row: Any, name: str = "tokens") -> np.ndarray:
    if isinstance(row, str | bytes):
        raise TypeError(f"{name}: prompt {i} is {shown(row)}; it must be a list of {IDS}")
    try:
        found = np.asarray(row)
    except jax.errors.TracerArrayConversionError:
        raise TypeError(
            f"{name}: prompt {i} holds values that are traced by jax.jit or its like: give "
            "concrete token ids"
        ) from None
    except Exception:  # lists of unequal lengths, and whatever a foreign object raises
        found = np.zeros((0, 0))
    if found.ndim != 1:
        raise ValueError(
            f"{name} must be a list of prompts, each a flat list of token ids; wrap a single "
            f"prompt in a list (prompt {i} is {shown(row)})"
        )
    return _integers(found, name) if len(found) else np.zeros(0, np.int64)


def _integers(array: np.ndarray, name: str = "tokens") -> np.ndarray:
    if name == "attention_mask" and array.dtype == bool:
        return array.astype(np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"{name} must be integers, given dtype {array.dtype}: {shown(array.tolist())}"
        )
    return array


def _cut(rows: list[np.ndarray], lengths: Any) -> list[np.ndarray]:
    """The first `lengths` ids of each row."""
    listed = isinstance(lengths, Sequence) or np.ndim(lengths) == 1
    if isinstance(lengths, str | bytes | None) or not listed:
        raise TypeError(
            f"lengths={shown(lengths)} must be a list with one number of tokens for each of the "
            f"{len(rows)} requests"
        )
    if len(lengths) != len(rows):
        raise ValueError(
            f"lengths={shown(lengths)} must have one entry for each of the {len(rows)} requests"
        )
    found = []
    for i, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        n = integer("lengths", n, most=None)
        if not 0 <= n <= len(row):
            raise ValueError(
                f"lengths={shown(list(lengths))}: prompt {i} has length {n}; it must be from 0 to "
                f"the {len(row)} given"
            )
        found.append(row[:n])
    return found


def _check_ids(i: int, row: np.ndarray, vocab_size: int) -> None:
    if len(row) and (row.min() < 0 or row.max() >= vocab_size):
        beyond = row.min() if row.min() < 0 else row.max()
        raise ValueError(
            f"tokens: prompt {i} holds token id {beyond}, outside the vocabulary [0, {vocab_size})"
        )


def check_context(
    attention: AttentionSpec,
    totals: np.ndarray,
    max_len: int,
    remedy: str = "make the first call with a larger max_len",
) -> None:
    """Refuse requests that outgrow model or cache: `totals` int [R] tokens that each may reach;
    `remedy`: how a larger cache is made.

    Raises:
        ValueError: names the request, the limit and the remedy.
    """
    worst = int(np.argmax(totals))
    if totals[worst] > attention.max_position_embeddings:
        raise ValueError(
            f"request {worst} may come to {totals[worst]} tokens (prompt and max_new_tokens), more "
            f"than the model's context of {attention.max_position_embeddings}; shorten the prompt "
            "or lower max_new_tokens"
        )
    if totals[worst] > max_len:
        raise ValueError(
            f"request {worst} may come to {totals[worst]} tokens, more than the cache's "
            f"max_len={max_len}; {remedy} or lower max_new_tokens"
        )


def chunk_size(longest: int, prefill_chunk: int, queries: int | str) -> int:
    """Length of the chunks: the power of two that holds the longest prompt, or `prefill_chunk`.

    Raises:
        ValueError: `prefill_chunk` is not a power of two of at least 16, or too small for the
            scoring queries to fit one chunk.
    """
    if prefill_chunk < MIN_CHUNK or prefill_chunk & (prefill_chunk - 1):
        raise ValueError(
            f"prefill_chunk={prefill_chunk} must be a power of two of at least {MIN_CHUNK}"
        )
    if longest > prefill_chunk and isinstance(queries, int) and prefill_chunk < queries:
        raise ValueError(
            f"prefill_chunk={prefill_chunk} must be at least queries={queries}: the last chunk "
            "holds all scoring queries"
        )
    return min(prefill_chunk, power_of_two(longest))


def chunks(
    tokens: np.ndarray, lengths: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Right-aligned chunks: int32 [R, size], real tokens int32 [R], and whether it is the last."""
    count = -(-int(lengths.max()) // size)
    padded = right_aligned([row[:n] for row, n in zip(tokens, lengths, strict=True)], count * size)
    for c in range(count):
        real = np.clip(lengths - (count - 1 - c) * size, 0, size).astype(np.int32)
        yield padded[:, c * size : (c + 1) * size], real, c == count - 1


def power_of_two(longest: int) -> int:
    """The power of two that holds `longest` tokens, at least `MIN_CHUNK`."""
    return max(MIN_CHUNK, 1 << (longest - 1).bit_length())


def right_aligned(rows: Sequence[Sequence[int] | np.ndarray], width: int) -> np.ndarray:
    """int32 [R, width], zeros before each row."""
    padded = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        padded[i, width - len(row) :] = row
    return padded
