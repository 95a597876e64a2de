"""Where numbers stopped being finite: a request that ends with "error" says in which layer."""

import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import KVCache


def warn_of_errors(cache: KVCache, rows: Sequence[int], stacklevel: int) -> None:
    """Warn of the requests `rows`, whose logits are not finite: layer and kind, as far as known.

    `stacklevel` is that of the user's line: 4 from a public function in `in_32_bits`.
    """
    for row, found in zip(rows, described(cache, rows), strict=True):
        said = f"request {row} ended with finish reason 'error': {found}"
        warnings.warn(said, RuntimeWarning, stacklevel=stacklevel)


def described(cache: KVCache, rows: Sequence[int]) -> list[str]:
    """Where the numbers of each of the requests `rows` stopped being finite, and what helps."""
    if not len(rows):
        return []
    spec = cache.spec
    paged = _finite(cache.recent.k, cache.recent.v, cache.counters.recent_len)
    # zeros where nothing came yet
    windowed = _finite(
        cache.sliding.k, cache.sliding.v, jnp.full_like(cache.counters.recent_len, spec.ring_len)
    )
    layers = spec.paged_layers + spec.window_layers
    finite = dict(zip(layers, jax.device_get((*paged, *windowed)), strict=True))
    texts = []
    for row in rows:
        bad = (layer for layer in sorted(finite) if not finite[layer][:, row].all())
        found = next(((layer, *finite[layer][:, row]) for layer in bad), None)
        texts.append(
            f"its logits are not finite. "
            f"{_cause(found)} The model computes in {spec.attention.dtype} and the cache keeps "
            f"{spec.dtype}: load it with dtype='bfloat16' or 'float32', whose range is wider than "
            "float16's, or look for NaN in the parameters"
        )
    return texts


def _cause(found: tuple[int, bool, bool] | None) -> str:
    if found is None:
        return (
            "The keys and values of its recent tokens are all finite, so the last layer or the "
            "projection to logits overflowed."
        )
    layer, keys, values = found
    kind = "keys and values" if not (keys or values) else "keys" if not keys else "values"
    before = "; so were the activations that entered it" if not (keys or values) else ""
    return (
        f"The first numbers of its recent tokens that are not finite are the {kind} of layer "
        f"{layer}{before}."
    )


@jax.jit
def _finite(k: Array | None, v: Array | None, count: Array) -> Array:
    """Whether the first `count` int32 [R] keys and values `[L, R, K, N, d]` of each layer and
    request are finite: bool [L, 2, R].
    """
    if k is None:
        return jnp.ones((0, 2, len(count)), bool)

    def of(x: Array | None) -> Array:
        if x is None:
            return jnp.ones(k.shape[:2], bool)
        beyond = jnp.arange(x.shape[3]) >= count[:, None, None]
        return (jnp.isfinite(x).all(axis=-1) | beyond).all(axis=(2, 3))

    return jnp.stack([of(k), of(v)], axis=1)
