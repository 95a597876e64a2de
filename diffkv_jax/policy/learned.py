"""`Learned`: the linear map a head that makes the error of codecs with one scale a token least.

Such a codec errs alike in all channels of k' = k A, in proportion to the size of k'. The error of a
logit is then E|k A|^2 E|q A^-T|^2 = tr(S B) tr(M B^-1), where B = A A^T, and S and M are the second
moments of keys and queries: least where B is the geometric mean of S^-1 and M. `Balanced` with the
power .5 is the diagonal case of queries that are all alike. A is the root of B in its own axes,
before a Hadamard matrix that spreads them over the channels. With the power 0 only axes are left,
those of queries (OSCAR, arXiv:2605.17757). Errors of values count alike in all directions: axes of
their own gain nothing that would be worth their bytes (docs/log.md), a Hadamard matrix is enough.
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.arguments import number
from diffkv_jax.model import AttentionSpec
from diffkv_jax.policy.stage import data, static, with_leaves
from diffkv_jax.policy.transform import Seen, Transform, rotated

_PRECISE = lax.Precision.HIGHEST
FLOOR = 1e-3  # least eigenvalue of a second moment, of their mean


class Learned(Transform):
    """Keys and queries scaled along axes of their head by a number and its inverse, then turned by
    a Hadamard matrix, and so are values.

    `power` .5 gives the least error, 0 a rotation alone. Best behind `Centered()`. The axes take
    head_dim^2 numbers a layer and KV head of a cache, whatever its requests: float32 in a model
    that computes in it, else float16.
    """

    power: float = static(default=0.5, convert=partial(number, least=0, most=1))
    key_axes: Array | None = data(default=None)
    key_scale: Array | None = data(default=None)

    def fit(self, seen: Seen, attention: AttentionSpec) -> "Learned":
        queries, keys = _moments(seen.q), _moments(jnp.sqrt(seen.weight) * seen.k)
        axes, scale = _axes(queries, keys, self.power)
        return with_leaves(self, key_axes=axes, key_scale=scale)

    def check_model(self, attention: AttentionSpec) -> None:
        if attention.latent is not None:
            raise ValueError(
                f"transform={self}, and the model has latents, which are keys and values at once: "
                "leave it out"
            )

    def queries(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        return self._turned_back(x, 1) if back else self._turned(x, -1)

    def keys(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        return self._turned_back(x, -1) if back else self._turned(x, 1)

    def values(self, x: Array) -> Array:
        return rotated(x)

    def output(self, x: Array) -> Array:
        return rotated(x, back=True)

    def _turned(self, x: Array, power: int) -> Array:
        """`x [..., d]` in its dtype, along the axes times the scale or its inverse, turned."""
        axes, scale = self._maps(power)
        found = jnp.einsum("...d,...de->...e", x.astype(jnp.float32), axes, precision=_PRECISE)
        return rotated(found * scale).astype(x.dtype)

    def _turned_back(self, x: Array, power: int) -> Array:
        """Inverse of `_turned` with the other power."""
        axes, scale = self._maps(power)
        found = rotated(x.astype(jnp.float32), back=True) * scale
        found = jnp.einsum("...e,...de->...d", found, axes, precision=_PRECISE)
        return found.astype(x.dtype)

    def _maps(self, power: int) -> tuple[Array, Array]:
        axes, scale = self.key_axes, self.key_scale
        assert axes is not None and scale is not None, "a cache has what `calibrate` learned"
        return axes.astype(jnp.float32), scale if power > 0 else 1 / scale


def _moments(x: Array) -> np.ndarray:
    """Second moments float64 [K, d, d] of `x [n, K, d]`, of a mean eigenvalue one."""
    sums = jnp.einsum("nkd,nke->kde", x, x, precision=lax.Precision.HIGHEST)
    found = np.asarray(sums, np.float64)
    size = np.trace(found, axis1=1, axis2=2)[:, None, None] / x.shape[-1]
    return found / np.where(size > 0, size, 1) + FLOOR * np.eye(x.shape[-1])


def _axes(queries: np.ndarray, keys: np.ndarray, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Axes float32 [K, d, d] in columns and their scales [K, d], of geometric mean one, from second
    moments.
    """
    root, inverse = _power(keys, 0.5), _power(keys, -0.5)
    best = inverse @ _power(root @ queries @ root, 0.5) @ inverse if power else queries
    sizes, axes = np.linalg.eigh(best)
    logs = power * np.log(np.maximum(sizes, 1e-12))
    scale = np.exp(logs - logs.mean(axis=-1, keepdims=True))
    return axes.astype(np.float32), scale.astype(np.float32)


def _power(matrix: np.ndarray, power: float) -> np.ndarray:
    """Of symmetric positive matrices [K, d, d]."""
    sizes, axes = np.linalg.eigh(matrix)
    return (axes * np.maximum(sizes, 1e-12)[:, None] ** power) @ np.swapaxes(axes, 1, 2)
