"""Products with stored weights on the CPU: the native kernel of cpu.cc."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from ..native import build

NUMBERS = (jnp.float32, jnp.bfloat16)


def supports(x: Array, weights: Sequence[Array]) -> bool:
    """Whether the kernel takes these types."""
    return all(array.dtype in NUMBERS for array in (x, *weights))


def linear(
    x: Array, weights: Sequence[Array], layer: Array | None, *, transposed: bool, dtype
) -> list[Array]:
    """`linear` of api.py. Reads the weights where they lie; bfloat16 by bfloat16 in AVX512-BF16
    where the CPU has it. A row's products do not depend on how many other rows there are.

    Raises:
        ValueError or jax.errors.JaxRuntimeError: when run, for a layer that the stack does not
            have.
    """
    rows = x.reshape(-1, x.shape[-1])
    stacks = [w if layer is not None else w[None] for w in weights]
    columns = [w.shape[1 if transposed else 2] for w in stacks]
    outputs = [jax.ShapeDtypeStruct((rows.shape[0], n), jnp.float32) for n in columns]
    run = build.call("linear", "linear_cpu", *outputs)
    index = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32)
    results = run(rows, index, *stacks, transposed=transposed)
    return [
        y.astype(dtype).reshape(*x.shape[:-1], n) for y, n in zip(results, columns, strict=True)
    ]
