"""Plain NumPy reference of the codecs that work on blocks of tokens, from the papers' equations. Blocks are `[..., channels, tokens]`."""

import numpy as np

from oracles.quantiser import unpack


def kivi_keys(x, bits):
    """KIVI (arXiv:2402.02750), eq. of sec. 3.1 per channel: z = min, s = (max - min) / (2^b - 1) over the tokens, both kept in float16."""
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    scale = (high - low) / np.float32(2**bits - 1)
    codes = np.rint((x - low) / np.where(scale > 0, scale, 1))
    return scale.astype(np.float16).astype(np.float32) * codes + low.astype(np.float16).astype(np.float32)


def with_outliers(x, inner, count, axis, fill):
    """GEAR (arXiv:2403.05527), sec. 3: the count / 2 largest and smallest of each vector along `axis` exactly, the others by `inner`
    after the vector's mean or median has taken the outliers' places. Returns the values read back and where the outliers are.
    """
    order = np.argsort(np.argsort(x, axis=axis), axis=axis)
    kept = (order < count // 2) | (order >= x.shape[axis] - count // 2)
    middle = (np.mean if fill == "mean" else np.median)(x, axis=axis, keepdims=True)
    return np.where(kept, x.astype(np.float16).astype(np.float32), inner(np.where(kept, middle, x))), kept


def read_block(codec, payload, meta):
    """The bytes of one block per channel, payload `[rows, T]` and metadata `[meta_rows, T]`, as float32 `[T, channels]`."""
    scale, zero = meta.reshape(-1)[: 2 * codec.head_dim].reshape(2, -1).astype(np.float32)
    return scale * unpack(payload, codec.bits).T + zero
