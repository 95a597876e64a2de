"""Plain NumPy reference of the levels for normal variables (TurboQuant, arXiv:2504.19874, section
3.1) and of the codes that name them.

Shares no code with the library: the levels come from the Lloyd-Max iteration, codes from the
distances to all levels.
"""

from functools import cache

import numpy as np
from scipy.special import ndtr, ndtri

from diffkv_jax.testing.stored_numbers import read_scale, stored_scale


@cache
def lloyd_max(bits):
    """The positive half of the 2^bits levels with the least mean squared error on N(0, 1), float64,
    smallest first.

    Each level becomes the mean of what is nearest to it until none moves: a fixed point of equation
    4 of the paper.
    """
    count = 2 ** (bits - 1)
    levels = ndtri(0.5 + (np.arange(count) + 0.5) / (2 * count))
    while True:
        edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
        means = np.diff(density) / np.diff(ndtr(-edges))  # both differences are negative
        if np.abs(means - levels).max() < 1e-13:
            return means
        levels = means


def rounded_levels(bits):
    """`lloyd_max` to the eight significant bits of bfloat16."""
    fraction, exponent = np.frexp(lloyd_max(bits))
    return np.ldexp(np.rint(fraction * 256) / 256, exponent)


def quantise_normal(values, bits):
    """Codes uint8 `[..., head_dim]` and stored scale `[..., 1]`: sign and number of the level
    nearest to `x sqrt(d) / |x|`.

    The scale makes the norm of what is read that of the token.
    """
    values, levels = np.asarray(values, np.float64), rounded_levels(bits)
    norm = np.linalg.norm(values, axis=-1, keepdims=True)
    turned = values * np.sqrt(values.shape[-1]) / np.where(norm > 0, norm, 1)
    number = np.abs(np.abs(turned)[..., None] - levels).argmin(axis=-1)
    codes = (number + (turned < 0) * 2 ** (bits - 1)).astype(np.uint8)
    return codes, stored_scale(
        (norm / np.linalg.norm(levels[number], axis=-1, keepdims=True)).astype(np.float32)
    )


def dequantise_normal(codes, scale, bits):
    """`scale * level` in float32, `codes [..., head_dim]`, `scale [..., 1]` as stored (float16) or
    as a number.
    """
    scale = read_scale(scale) if scale.dtype == np.float16 else scale
    signed = np.concatenate([rounded_levels(bits), -rounded_levels(bits)])
    return (scale * signed[codes]).astype(np.float32)
