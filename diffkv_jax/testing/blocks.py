"""Plain NumPy reference of the codecs that work on blocks of tokens, from the papers' equations.
Blocks are `[..., channels, tokens]`.
"""

import numpy as np

from diffkv_jax.testing import stored_numbers as stored
from diffkv_jax.testing.quantiser import dequantise, unpack


def kivi_keys(x, bits):
    """KIVI (arXiv:2402.02750), eq. of sec. 3.1 per channel: z = min, s = (max - min) / (2^b - 1)
    over the tokens, both kept in 16 bits.
    """
    scale, zero, kept_scale, kept_zero = stored.grid(
        x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True), 2**bits - 1
    )
    codes = np.rint((x - zero) / np.where(scale > 0, scale, 1))
    return stored.read_scale(kept_scale) * codes + stored.read_zero(kept_scale, kept_zero)


def with_outliers(x, inner, count, axis, fill):
    """GEAR (arXiv:2403.05527), sec. 3: the count / 2 largest and smallest of each vector along
    `axis` exactly, the others by `inner` after the vector's mean or median has taken the outliers'
    places. Returns the values read back and where the outliers are.
    """
    order = np.argsort(np.argsort(x, axis=axis), axis=axis)
    kept = (order < count // 2) | (order >= x.shape[axis] - count // 2)
    middle = (np.mean if fill == "mean" else np.median)(x, axis=axis, keepdims=True)
    return np.where(kept, stored.kept_outlier(x), inner(np.where(kept, middle, x))), kept


def gear_low_rank(error, rank, iterations=3):
    """GEAR (arXiv:2403.05527), algorithm 2: L = Q P^T of `error [..., tokens, channels]`, from P of
    the generator of seed 0.
    """
    p = np.broadcast_to(
        np.random.default_rng(0).uniform(size=(error.shape[-1], rank)),
        (*error.shape[:-2], error.shape[-1], rank),
    )
    for _ in range(iterations - 1):
        p = np.swapaxes(error, -1, -2) @ (error @ p)
    p = np.linalg.qr(p)[0]
    q = np.linalg.qr(error @ p)[0]
    p = np.swapaxes(error, -1, -2) @ q
    return q @ np.swapaxes(p, -1, -2)


def gear(x, inner, count, axis, rank):
    """GEAR of blocks `[..., channels, tokens]`: backbone `inner`, `count` outliers of each vector
    along `axis`, and the low rank.
    """
    backbone = with_outliers(x, inner, count, axis, "mean")[0] if count else inner(x)
    error = np.swapaxes(x - backbone, -1, -2).astype(np.float64)
    return backbone + np.swapaxes(gear_low_rank(error, rank), -1, -2) if rank else backbone


def outliers(rows):
    """float32 of stored outliers `[count, n]`: those of the upper half are paired with those of the
    lower.
    """
    return np.concatenate(stored.read_outliers(*np.split(rows, 2)))


def stored_rows(codec, head_dim):
    """(payload bytes, float16 numbers) of a token's lane, those of a block rounded up to whole rows
    of its lanes.
    """
    if hasattr(codec, "rank"):
        payload, meta = stored_rows(codec.codec, head_dim)
        return payload, meta + codec.rank - (-head_dim * codec.rank // codec.tokens)
    if hasattr(codec, "share"):
        payload, meta = stored_rows(codec.codec, head_dim)
        rows = codec.count if codec.axis == "token" else -(-head_dim * codec.count // codec.tokens)
        return payload + rows, meta + rows
    if hasattr(codec, "tokens"):
        return head_dim * codec.bits // 8, -(-2 * head_dim // codec.tokens)
    return head_dim * codec.bits // 8, 2 * codec.groups


def read_block(codec, payload, meta):
    """The bytes of one block, payload `[rows, T]` and metadata float16 `[meta_rows, T]`, as float32
    `[T, channels]`.
    """
    if hasattr(codec, "rank"):
        _, own = stored_rows(codec.codec, codec.head_dim)
        q = meta[own : own + codec.rank].astype(np.float32)
        p = (
            meta[own + codec.rank :]
            .reshape(-1)[: codec.head_dim * codec.rank]
            .reshape(codec.head_dim, -1)
        )
        p = np.where(
            np.abs(q).max(axis=1) > 2,
            p.view(stored.BFLOAT16).astype(np.float32),
            p.astype(np.float32),
        )
        return read_block(codec.codec, payload, meta[:own]) + (p @ q).T
    if hasattr(codec, "share"):
        rows, own = stored_rows(codec.codec, codec.head_dim)
        x, index, values = (
            read_block(codec.codec, payload[:rows], meta[:own]),
            payload[rows:],
            meta[own:],
        )
        if codec.axis == "channel":
            index, values = (
                part.reshape(-1)[: codec.head_dim * codec.count].reshape(codec.head_dim, -1)
                for part in (index, values)
            )
            x[index.T, np.arange(codec.head_dim)] = outliers(values.T)
        else:
            x[np.arange(codec.tokens), index] = outliers(values)
        return x
    if hasattr(codec, "tokens"):
        scale, zero = meta.reshape(-1)[: 2 * codec.head_dim].reshape(2, -1)
        return stored.read_scale(scale) * unpack(payload, codec.bits).T + stored.read_zero(
            scale, zero
        )
    return dequantise(unpack(payload, codec.bits).T, meta[: codec.groups].T, meta[codec.groups :].T)
