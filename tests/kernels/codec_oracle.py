"""What the bytes of a block must be, by the NumPy quantiser, and how near a codec must come."""

import jax.numpy as jnp
import numpy as np

from diffkv_jax.pallas_kernels.codecs import Full, KVFormat, Normal, Uniform
from diffkv_jax.testing.normal_levels import quantise_normal, rounded_levels
from diffkv_jax.testing.quantiser import pack, quantise, unpack
from diffkv_jax.testing.stored_numbers import grid

HALF_WAY = 1e-4  # see same_codes


def parse(name: str) -> KVFormat:
    """`full:<dtype>` besides what `KVFormat.parse` takes."""
    return KVFormat.parse("full", name[5:]) if name.startswith("full:") else KVFormat.parse(name)


def ordinary(tokens: int, head_dim: int, seed: int = 0) -> np.ndarray:
    """Keys or values float32 [tokens, head_dim]: normal draws with an offset a channel, one
    constant token and one of zeros.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, head_dim)) * 3 + rng.normal(size=head_dim) * 5
    x[5], x[6] = -1.37, 0.0
    return x.astype(np.float32)


def of_any_size(tokens: int, head_dim: int, seed: int = 0) -> np.ndarray:
    """`ordinary` tokens times anything from 1e-30 to 1e30; a few with one huge channel, constant,
    or at the ends of float32.
    """
    rng = np.random.default_rng(seed)
    x = ordinary(tokens, head_dim, seed) * 10.0 ** rng.uniform(-30, 30, (tokens, 1))
    x[0::8, 3], x[1::8] = 1e6 * rng.normal(size=len(x[0::8])), 3e38 * np.sign(x[1::8])
    x[2::8], x[3::8] = ordinary(tokens, head_dim, seed)[2::8] * 1e4, -1e-9
    x[5], x[6] = -1e7, 0.0
    return x.astype(np.float32)


def expected(codec, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Payload and metadata of `[T, head_dim]` by the oracle."""
    if isinstance(codec, Full):
        exact = x.astype(jnp.dtype(codec.dtype))
        planes = exact.view(np.uint8).reshape(*x.shape, -1)  # [T, d, bytes]
        return planes.transpose(2, 1, 0).reshape(-1, len(x)), np.zeros((0, len(x)), np.float16)
    if isinstance(codec, Normal):
        codes, scale = quantise_normal(x, codec.bits)
        return pack(codes.T, codec.bits), scale.T
    codes, scale, zero = quantise(x, codec.bits, codec.groups)
    return pack(codes.T, codec.bits), np.concatenate([scale.T, zero.T])


def same_codes(codec, x: np.ndarray, payload: np.ndarray, wanted: np.ndarray) -> None:
    """The payload equals the oracle's, but for codes that lie half-way between two.

    XLA divides by the constant 2^b - 1 by multiplying with its reciprocal, so the scale may be one
    unit in the last place off the true quotient, and a ratio within rounding of a half may go to
    the other neighbour.
    """
    if isinstance(codec, Full):
        np.testing.assert_array_equal(payload, wanted)
        return
    got, codes = unpack(payload, codec.bits).astype(int).T, unpack(wanted, codec.bits).astype(int).T
    if isinstance(codec, Normal):
        size, levels = (
            np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True)),
            rounded_levels(codec.bits),
        )
        ratio = np.abs(x / np.where(size > 0, size, 1))
        doubtful = np.any(
            [
                np.abs(ratio - (a + b) / 2) < HALF_WAY
                for a, b in zip(levels, levels[1:], strict=False)
            ]
            or [ratio < 0],
            axis=0,
        )
        np.testing.assert_array_equal(got[~doubtful], codes[~doubtful])
        assert np.abs(got - codes).max() <= 1 and doubtful.mean() < 0.01
        return
    grouped = x.astype(np.float32).reshape(len(x), codec.groups, -1)
    scale, zero, *_ = grid(
        grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True), 2**codec.bits - 1
    )
    ratio = (grouped.astype(np.float64) - zero) / np.where(scale > 0, scale, 1)
    doubtful = (np.abs(ratio % 1 - 0.5) < HALF_WAY).reshape(x.shape)
    np.testing.assert_array_equal(got[~doubtful], codes[~doubtful])
    assert np.abs(got - codes).max() <= 1


def same_meta(got: np.ndarray, wanted: np.ndarray) -> None:
    """float16 metadata equal but for one number in a hundred, which may be one unit in the last
    place off (see same_codes).
    """
    assert got.dtype == np.float16 and got.shape == wanted.shape
    off = np.abs(got.astype(np.float64) - wanted.astype(np.float64))
    assert (
        np.all(off <= np.spacing(np.abs(wanted)).astype(np.float64))
        and (off > 0).sum() <= 0.01 * off.size + 1
    )


def codes_of(
    codec: Uniform, payload: np.ndarray, meta: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes `[T, d]`, scale and zero `[T, groups]` of a block of integer codes."""
    return unpack(payload, codec.bits).T, meta[: codec.groups].T, meta[codec.groups :].T
