"""How budgets are spread over the layers, as factors of each layer's budget, mean 1.

`largest_share`: of the tokens, when budgets are shares: no layer keeps more than all; else None.
"""

import numpy as np

PYRAMID_STEEPNESS = 20.0
COSINE_FLOOR = 0.9  # what the last layer keeps of the one before it


def pyramid(layers: int, largest_share: float | None) -> np.ndarray:
    """float [layers], linear, the last layer's is 1 / PYRAMID_STEEPNESS (PyramidKV,
    arXiv:2406.02069).
    """
    first = 2 - 1 / PYRAMID_STEEPNESS
    first = first if largest_share is None else min(first, 1 / float(largest_share))
    return np.linspace(first, 2 - first, layers) if layers > 1 else np.ones(layers)


def cosine(layers: int, largest_share: float | None) -> np.ndarray:
    """float [layers]: layer l keeps (1 - r)(cos(pi l / layers) + 1) / 2 + r of the one before
    (PyramidInfer, arXiv:2405.12532), r = COSINE_FLOOR. Where a layer would keep more than all, the
    factors come nearer to 1 until it fits.
    """
    turn = (np.cos(np.pi * np.arange(layers) / layers) + 1) / 2
    kept = np.cumprod((1 - COSINE_FLOOR) * turn + COSINE_FLOOR)
    beyond = kept / kept.mean() - 1
    room = np.inf if largest_share is None else 1 / float(largest_share) - 1
    return 1 + beyond * min(1, room / max(beyond[0], 1e-9))


SPREADS = {"pyramid": pyramid, "cosine": cosine}
