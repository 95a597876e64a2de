"""KVQuant's equations in NumPy: levels of tokens and channels, outliers apart, attention."""

import numpy as np

FREQUENCIES = 10000.0 ** (-np.arange(16) / 16)


def half(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


def token_levels(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """`x [n, d]` coded by the levels of each token's range, and decoded (sec. 3.3 and 3.2: per
    token for values).
    """
    high, low = x.max(axis=1, keepdims=True), x.min(axis=1, keepdims=True)
    span, middle = half((high - low) / 2), half((high + low) / 2)
    scaled = (x - middle) / np.where(span > 0, span, 1)
    return levels[np.abs(scaled[..., None] - levels).argmin(axis=-1)] * span + middle


def channel_levels(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`x [n, d]` coded by each channel's own levels, `table [d, levels]`."""
    return np.take_along_axis(table, np.abs(x[..., None] - table).argmin(axis=-1).T, axis=1).T


def coupled(x: np.ndarray, books: np.ndarray) -> np.ndarray:
    """Groups of channels replaced by the nearest rows of `books [groups, rows, c]`."""
    parts = np.split(x, len(books), axis=1)
    return np.concatenate(
        [b[np.square(p[:, None] - b).sum(-1).argmin(1)] for p, b in zip(parts, books, strict=True)],
        axis=1,
    )


def apart(x: np.ndarray, by: np.ndarray, rest, count: int = 1, fill=np.median) -> np.ndarray:
    """The `count` largest and smallest of each token, as `by [n, d]` ranks them, exact in float16;
    the rest coded by `rest`.
    """
    order = by.argsort(axis=1, kind="stable")
    taken = np.zeros(x.shape, bool)
    np.put_along_axis(
        taken, np.concatenate([order[:, :count], order[:, -count:]], axis=1), True, axis=1
    )
    return np.where(taken, half(x), rest(np.where(taken, fill(x, axis=1, keepdims=True), x)))


def coded_keys(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """KVQuant's keys `[n, d]`, outliers apart."""
    scaled = (x - table[:, 0, 0]) / (table[:, -1, 0] - table[:, 0, 0])
    return apart(x, scaled, lambda rest: channel_levels(rest, table[..., 0]))


def coded_values(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """KVQuant's values `[n, d]`, outliers apart."""
    return apart(x, x, lambda rest: token_levels(rest, levels))


def dense(q, k, v, recent_k, recent_v, sm_scale: float) -> np.ndarray:
    """Softmax attention of `q [G, d]`: stored keys get their rotary embedding, those of the window
    have it.
    """
    pairs = (k[:, :16] + 1j * k[:, 16:]) * np.exp(1j * np.arange(len(k))[:, None] * FREQUENCIES)
    keys = np.concatenate([np.concatenate([pairs.real, pairs.imag], axis=1), recent_k])
    logits = q @ keys.T * sm_scale
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ np.concatenate([v, recent_v])
