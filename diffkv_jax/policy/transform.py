"""`Transform`: keys and values are kept shifted, scaled or turned, or without their rotary
embedding.

A softmax does not change when one vector is taken from all keys of a head, a dot product when the
key goes through an invertible matrix and the query through its inverse transposed; the output comes
back because weights add up to one. Codecs that share a scale over a token's channels lose less when
no channel stands out (QuaRot, arXiv:2404.00456; TurboQuant, arXiv:2504.19874; SmoothQuant,
arXiv:2211.10438).
"""

from functools import lru_cache
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array, lax

from diffkv_jax.model import AttentionSpec
from diffkv_jax.policy.stage import Stage, overrides


class Seen(NamedTuple):
    """What a transform learns from: queries, keys and values of a layer, float32.

    An error in a token's key or value counts by the squares of the attention that it gets: their
    means over all queries are its weight.
    """

    # [head_dim, kv_heads, head_dim] of the second moment of all queries that a KV head serves
    q: Array
    k: Array  # [n, kv_heads, head_dim]
    v: Array  # [n, kv_heads, head_dim]
    weight: Array  # [n, kv_heads, 1] that add up to one


class Transform(Stage):
    """What keys, values, queries and outputs [..., head_dim] go through on their way to and from
    the cache. Queries and keys by maps that leave a query's softmax as it is.

    What differs by head is a `data` field with the default None: an array that `fit` learns, which
    a cache has for each layer and KV head, and which broadcasts with what a verb is given.

    `position_free` says that keys are stored without their rotary embedding.
    """

    position_free: ClassVar[bool] = False

    @property
    def learned(self) -> bool:
        """Whether `fit` learns something, so that a cache needs a calibration."""
        return overrides(self, "fit", Transform)

    def fit(self, seen: Seen, attention: AttentionSpec) -> "Transform":
        """With what it learns of a layer: arrays [kv_heads, head_dim] or [kv_heads, head_dim,
        head_dim].
        """
        return self

    def check_model(self, attention: AttentionSpec) -> None:
        """Raise ValueError where the model's attention would change."""

    def queries(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        """Queries as stored keys want them; `back`: the inverse."""
        return x

    def keys(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        """Keys as they are stored; `back`: the inverse. `rope`: where they change by position."""
        return x

    def values(self, x: Array) -> Array:
        """Values as they are stored."""
        return x

    def output(self, x: Array) -> Array:
        """Inverse of `values`, of what attention mixes of them."""
        return x

    def rope(self, attention: AttentionSpec) -> tuple[float, ...] | None:
        """Angles per position of the rotary embedding that keys are stored without, and get back
        where attention reads them; None: keys are stored with it.

        Raises:
            ValueError: the model has none that is known.
        """
        return None


class Exact(Transform):
    """Keys and values as the model makes them."""


class Usual(Transform):
    """`Chain((Centered(), Learned()))` for codecs with one scale a token, wherever there is a text
    to learn it from: that of a model of `load_pretrained`, or one given to `calibrate`. Else
    nothing.
    """


EXACT, USUAL = Exact(), Usual()


class Hadamard(Transform):
    """Turned by a Hadamard matrix with random signs (a random rotation where there is none)."""

    def queries(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        latent = attention.latent
        if latent is None:
            return rotated(x, back=back)
        # the rotary part stays as it is
        return jnp.concatenate([rotated(x[..., :latent], back=back), x[..., latent:]], axis=-1)

    def keys(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        return self.queries(x, attention, back=back)

    def values(self, x: Array) -> Array:
        return rotated(x) if x.shape[-1] else x

    def output(self, x: Array) -> Array:
        return rotated(x, back=True)


class WithoutRope(Transform):
    """Keys without their rotary embedding: of kernels, only decode attention reads such."""

    position_free = True

    def rope(self, attention: AttentionSpec) -> tuple[float, ...] | None:
        if attention.latent is not None:
            raise ValueError("WithoutRope(), and a latent carries no rotary embedding anyway")
        if attention.rope is None:
            raise ValueError(
                "WithoutRope(), and the model does not tell its rotary embedding "
                "(AttentionSpec.rope)"
            )
        return attention.rope


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
