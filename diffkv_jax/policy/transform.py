"""The transform stage: keys, values and queries turned by one orthogonal matrix, so that a few
large channels spread over all.

A dot product does not change when both vectors turn, and the output turns back. Codecs that share a
scale over a token's channels lose less (QuaRot, arXiv:2404.00456; TurboQuant, arXiv:2504.19874).
"""

from functools import lru_cache

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array, lax


@lru_cache
def rotation(head_dim: int) -> np.ndarray:
    """float32 [head_dim, head_dim], orthogonal: a Hadamard matrix with random signs, or a random
    rotation where there is none.

    The same for every layer, head and run.
    """
    rng = np.random.default_rng(0)
    if head_dim & (head_dim - 1) == 0:
        signs = rng.choice([-1.0, 1.0], size=(head_dim, 1))
        return (signs * scipy.linalg.hadamard(head_dim) / np.sqrt(head_dim)).astype(np.float32)
    return np.linalg.qr(rng.normal(size=(head_dim, head_dim)))[0].astype(np.float32)


def rotated(x: Array, *, back: bool = False) -> Array:
    """`x [..., head_dim]` turned, or turned back, in its own dtype out of float32 sums."""
    matrix = rotation(x.shape[-1])
    turned = jnp.matmul(
        x.astype(jnp.float32), matrix.T if back else matrix, precision=lax.Precision.HIGHEST
    )
    return turned.astype(x.dtype)


def rotated_first(x: Array, channels: int) -> Array:
    """`x [..., head_dim]` with its first `channels` turned, the others as they are."""
    return jnp.concatenate([rotated(x[..., :channels]), x[..., channels:]], axis=-1)
