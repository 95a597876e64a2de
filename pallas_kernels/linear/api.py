"""Products of activations with stored weights: the public function."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from ..dispatch import XLA, Kernels
from ..precision import in_32_bits


@in_32_bits
def linear(
    x: Array,
    weights: Sequence[Array],
    layer: Array | None = None,
    *,
    transposed: bool = False,
    dtype: str | None = None,
    kernels: Kernels = XLA,
) -> list[Array]:
    """`x` times each of several weights of one layer.

    In a loop over layers, XLA copies a layer's slice of the stacked weights before a product reads
    it: a decode step then moves the whole model three times. The native kernel reads the stack
    where it lies, and its results for a row do not depend on the other rows.

    Args:
        x: float32 or bfloat16 `[..., in]`.
        weights: each `[L, in, out]` with `layer`, `[in, out]` without; `[out, in]` when
            `transposed`.
        layer: int32 [], which layer of the stacks.
        dtype: of the results, x's when None; sums are float32.
        kernels: which implementation runs.

    Returns:
        `[..., out]` of each.
    """
    result = jnp.dtype(dtype or x.dtype)
    if kernels.implementation == "cpu":
        from . import cpu

        if cpu.supports(x, weights):
            return cpu.linear(x, weights, layer, transposed=transposed, dtype=result)
    rows = x.reshape(-1, x.shape[-1])  # one matrix, not a batch of them
    # copied not before x is known: then the copies of a layer's weights share their space
    if layer is not None:
        rows, layer = jax.lax.optimization_barrier((rows, layer))
    pattern = "ri,oi->ro" if transposed else "ri,io->ro"
    taken = (w if layer is None else w[layer] for w in weights)
    products = (
        jnp.einsum(pattern, rows, w.astype(x.dtype), preferred_element_type=jnp.float32)
        for w in taken
    )
    return [y.astype(result).reshape(*x.shape[:-1], -1) for y in products]


def sum_of_rows(x: Array, *, kernels: Kernels = XLA) -> Array:
    """Sums over the last axis, float32 `[..., 1]`.

    How XLA adds on a CPU differs with the number of rows. The native kernels multiply with ones
    instead: always in the same order.
    """
    if kernels.implementation != "cpu":
        return jnp.sum(x.astype(jnp.float32), axis=-1, keepdims=True)
    return linear(
        x,
        [jnp.ones((1, x.shape[-1]), jnp.float32)],
        transposed=True,
        dtype="float32",
        kernels=kernels,
    )[0]
