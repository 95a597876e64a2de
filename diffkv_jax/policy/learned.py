"""`Learned`: the linear map a head that makes the error of codecs with one scale a token least.

Such a codec errs alike in all channels of k' = k A, in proportion to the size of k'. The error of a
logit is then E|k A|^2 E|q A^-T|^2 = tr(S B) tr(M B^-1), where B = A A^T, and S and M are the second
moments of keys and queries: least where B is the geometric mean of S^-1 and M. `Balanced` with the
power .5 is the diagonal case of queries that are all alike. For values, whose errors count alike in
all directions, M is the identity. A is the root of B in its own axes, before a Hadamard matrix that
spreads them over the channels. With the power 0 only axes are left: those of queries for keys, of
values for values (OSCAR, arXiv:2605.17757).
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.arguments import number
from diffkv_jax.model import AttentionSpec
from diffkv_jax.policy.stage import data, static, with_leaves
from diffkv_jax.policy.transform import Seen, Transform, rotated

FLOOR = 1e-3  # least eigenvalue of a second moment, of their mean


class Learned(Transform):
    """Keys and queries scaled along axes of their head by a number and its inverse, values along
    axes of their own, all then turned by a Hadamard matrix.

    `power` .5 gives the least error, 0 a rotation alone. Best behind `Centered()`. The axes take
    2 head_dim^2 float32 numbers a layer and KV head of a cache, whatever its requests.
    """

    power: float = static(default=0.5, convert=partial(number, least=0, most=1))
    key_axes: Array | None = data(default=None)
    key_scale: Array | None = data(default=None)
    value_axes: Array | None = data(default=None)
    value_scale: Array | None = data(default=None)

    def fit(self, seen: Seen, attention: AttentionSpec) -> "Learned":
        root = jnp.sqrt(seen.weight)
        queries, keys, values = map(_moments, (seen.q, root * seen.k, root * seen.v))
        same = np.broadcast_to(np.eye(values.shape[-1]), values.shape)
        names = ("key_axes", "key_scale", "value_axes", "value_scale")
        found = (
            *_axes(queries, keys, queries, self.power),
            *_axes(same, values, values, self.power),
        )
        return with_leaves(self, **dict(zip(names, found, strict=True)))

    def check_model(self, attention: AttentionSpec) -> None:
        if attention.latent is not None:
            raise ValueError(
                f"transform={self}, and the model has latents, which are keys and values at once: "
                "leave it out"
            )

    def queries(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        return _back(x, self.key_axes, self.key_scale, 1) if back else self._keys(x, -1)

    def keys(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        return _back(x, self.key_axes, self.key_scale, -1) if back else self._keys(x, 1)

    def values(self, x: Array) -> Array:
        return _along(x, self.value_axes, self.value_scale, 1)

    def output(self, x: Array) -> Array:
        return _back(x, self.value_axes, self.value_scale, -1)

    def _keys(self, x: Array, power: int) -> Array:
        return _along(x, self.key_axes, self.key_scale, power)


def _along(x: Array, axes: Array | None, scale: Array | None, power: int) -> Array:
    """`x [..., d]` in its dtype, along the axes times the scale or its inverse, turned."""
    assert axes is not None and scale is not None, "a cache has what `calibrate` learned"
    found = jnp.einsum(
        "...d,...de->...e", x.astype(jnp.float32), axes, precision=lax.Precision.HIGHEST
    )
    return rotated(found * (scale if power > 0 else 1 / scale)).astype(x.dtype)


def _back(x: Array, axes: Array | None, scale: Array | None, power: int) -> Array:
    """Inverse of `_along` with the other power."""
    assert axes is not None and scale is not None, "a cache has what `calibrate` learned"
    found = rotated(x.astype(jnp.float32), back=True) * (scale if power > 0 else 1 / scale)
    found = jnp.einsum("...e,...de->...d", found, axes, precision=lax.Precision.HIGHEST)
    return found.astype(x.dtype)


def _moments(x: Array) -> np.ndarray:
    """Second moments float64 [K, d, d] of `x [n, K, d]`, of a mean eigenvalue one."""
    sums = jnp.einsum("nkd,nke->kde", x, x, precision=lax.Precision.HIGHEST)
    found = np.asarray(sums, np.float64)
    size = np.trace(found, axis1=1, axis2=2)[:, None, None] / x.shape[-1]
    return found / np.where(size > 0, size, 1) + FLOOR * np.eye(x.shape[-1])


def _axes(
    wanted: np.ndarray, given: np.ndarray, plain: np.ndarray, power: float
) -> tuple[np.ndarray, np.ndarray]:
    """Axes float32 [K, d, d] in columns and their scales [K, d], of geometric mean one, from second
    moments: of queries, of keys, and those whose axes are taken where the power is zero.
    """
    root, inverse = _power(given, 0.5), _power(given, -0.5)
    best = inverse @ _power(root @ wanted @ root, 0.5) @ inverse if power else plain
    sizes, axes = np.linalg.eigh(best)
    logs = power * np.log(np.maximum(sizes, 1e-12))
    scale = np.exp(logs - logs.mean(axis=-1, keepdims=True))
    return axes.astype(np.float32), scale.astype(np.float32)


def _power(matrix: np.ndarray, power: float) -> np.ndarray:
    """Of symmetric positive matrices [K, d, d]."""
    sizes, axes = np.linalg.eigh(matrix)
    return (axes * np.maximum(sizes, 1e-12)[:, None] ** power) @ np.swapaxes(axes, 1, 2)
