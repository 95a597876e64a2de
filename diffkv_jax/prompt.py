"""Prompts as the user gives them, checked and cut into right-aligned chunks. NumPy only: nothing has been computed yet."""

from collections.abc import Iterator, Sequence

import numpy as np

from diffkv_jax.cache import CacheSpec
from diffkv_jax.model_protocol import AttentionSpec
from diffkv_jax.replay import Replay

MIN_CHUNK = 16
PASS_ROWS = 512  # a pass of more rows has a multiple of them, as attention wants


def as_batch(
    tokens: np.ndarray | Sequence[Sequence[int]], lengths: Sequence[int] | np.ndarray | None, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 [R, N] (right-padded) and lengths int32 [R]; `tokens` may be a ragged list, then `lengths` is not needed.

    Raises:
        ValueError: no request, an empty prompt, lengths that do not fit, a token id outside the vocabulary, or not integers.
    """
    if not hasattr(tokens, "shape"):
        rows = [np.asarray(row) for row in tokens]
        if any(row.ndim != 1 for row in rows):
            raise ValueError("tokens must be a list of prompts, each a flat list of token ids; wrap a single prompt in a list")
        lengths = np.array([len(row) for row in rows], np.int32) if lengths is None else lengths
        padded = np.zeros((len(rows), max([0, *map(len, rows)])), np.int64)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = _integers(row) if len(row) else 0
        tokens = padded
    batch = _integers(np.asarray(tokens))
    if batch.ndim != 2 or batch.shape[0] == 0:
        raise ValueError(f"tokens must be [requests, length] with at least one request, given shape {batch.shape}")
    sizes = np.full(batch.shape[0], batch.shape[1]) if lengths is None else _integers(np.asarray(lengths))
    if sizes.shape != batch.shape[:1]:
        raise ValueError(f"lengths must have one entry for each of the {batch.shape[0]} requests, given shape {sizes.shape}")
    for i, size in enumerate(sizes):
        if not 1 <= size <= batch.shape[1]:
            raise ValueError(
                f"prompt {i} has length {size}; it must hold at least one token and at most the {batch.shape[1]} given (empty prompt?)"
            )
        row = batch[i, :size]
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(
                f"prompt {i} holds token id {row.min() if row.min() < 0 else row.max()}, outside the vocabulary [0, {vocab_size})"
            )
    return batch.astype(np.int32), sizes.astype(np.int32)


def _integers(array: np.ndarray) -> np.ndarray:
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"token ids and lengths must be integers, given dtype {array.dtype}")
    return array


def check_context(attention: AttentionSpec, totals: np.ndarray, max_len: int) -> None:
    """Refuse requests that would outgrow the model or the cache. `totals` int [R] tokens that each may come to.

    Raises:
        ValueError: names the request, the limit and the remedy.
    """
    worst = int(np.argmax(totals))
    if totals[worst] > attention.max_position_embeddings:
        raise ValueError(
            f"request {worst} may come to {totals[worst]} tokens (prompt and max_new_tokens), more than the model's context of "
            f"{attention.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
        )
    if totals[worst] > max_len:
        raise ValueError(
            f"request {worst} may come to {totals[worst]} tokens, more than the cache's max_len={max_len}; "
            "make the first call with a larger max_len or lower max_new_tokens"
        )


def check_evicts_once(spec: CacheSpec, seen: np.ndarray, lengths: np.ndarray, size: int) -> None:
    """Refuse prompts that would have stored tokens dropped which share numbers. `seen`, `lengths` int [R], `size` is that of a chunk.

    Raises:
        ValueError: a prompt of several chunks, or one after another.
    """
    if spec.layout.together == 1 or spec.selection.score is None:
        return
    rule = f"{spec.layout.formats[0].name} shares numbers between tokens, so the policy drops tokens before they are encoded"
    if lengths.max() > size:
        raise ValueError(f"{rule}: a prompt of {lengths.max()} tokens must fit one chunk of {size}; raise prefill_chunk")
    if seen.any():
        raise ValueError(f"{rule}, and this cache holds a prompt already; begin a new cache, or take a codec for each token such as 'K4V4'")


def chunk_size(longest: int, prefill_chunk: int, observe: int) -> int:
    """Length of the chunks: the power of two that holds the longest prompt, at most `prefill_chunk`.

    Raises:
        ValueError: `prefill_chunk` is not a power of two of at least 16, or too small for the observing queries to fit one chunk.
    """
    if prefill_chunk < MIN_CHUNK or prefill_chunk & (prefill_chunk - 1):
        raise ValueError(f"prefill_chunk={prefill_chunk} must be a power of two of at least {MIN_CHUNK}")
    if longest > prefill_chunk and prefill_chunk < observe:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least observe={observe}: the last chunk holds all observing queries")
    return min(prefill_chunk, _power_of_two(longest))


def chunks(tokens: np.ndarray, lengths: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Right-aligned chunks: int32 [R, size], real tokens int32 [R] at their end, and whether it is the last."""
    count = -(-int(lengths.max()) // size)
    padded = _right_aligned([row[:n] for row, n in zip(tokens, lengths, strict=True)], count * size)
    for c in range(count):
        real = np.clip(lengths - (count - 1 - c) * size, 0, size).astype(np.int32)
        yield padded[:, c * size : (c + 1) * size], real, c == count - 1


def replay_passes(replay: Replay, tokens: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Right-aligned passes over prompts `tokens` [R, N] of `lengths` [R]: int32 [R, C], real tokens int32 [R], first position."""
    starts = range(0, int(lengths.max()), replay.chunk)
    passes = [[replay.row(row[:n], at) for row, n in zip(tokens, lengths, strict=True)] for at in starts]
    longest = max(len(row) for rows in passes for row in rows)
    width = -(-longest // PASS_ROWS) * PASS_ROWS if longest > PASS_ROWS else _power_of_two(longest)
    for at, rows in zip(starts, passes, strict=True):
        yield _right_aligned(rows, width), np.array([len(row) for row in rows], np.int32), at


def _power_of_two(longest: int) -> int:
    """The power of two that holds `longest` tokens, at least `MIN_CHUNK`."""
    return max(MIN_CHUNK, 1 << (longest - 1).bit_length())


def _right_aligned(rows: Sequence[Sequence[int] | np.ndarray], width: int) -> np.ndarray:
    """int32 [R, width], zeros before each row."""
    padded = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        padded[i, width - len(row) :] = row
    return padded
