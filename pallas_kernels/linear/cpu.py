"""Products with stored weights on the CPU: the native kernel of cpu.cc."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from .. import native

NUMBERS = (jnp.float32, jnp.bfloat16)
FEW_ROWS = 32  # up to here reading the weights is what takes the time


def supports(x: Array, weights: Sequence[Array], *, transposed: bool) -> bool:
    """Whether the kernel takes these types, and is better than XLA's products at so many rows."""
    types = [x.dtype, *(w.dtype for w in weights)]
    if x.size <= FEW_ROWS * x.shape[-1]:
        return all(dtype in NUMBERS for dtype in types)
    even = x.shape[-1] % 2 == 0 and not transposed and all(dtype == jnp.bfloat16 for dtype in types)
    return even and bool(native.library("linear").multiplies_many_rows())


def linear(x: Array, weights: Sequence[Array], layer: Array | None, *, transposed: bool, dtype) -> list[Array]:
    """`linear` of api.py. Reads the weights where they lie; bfloat16 by bfloat16 in AVX512-BF16 where the CPU has it.

    Raises:
        ValueError or jax.errors.JaxRuntimeError: when run, for a layer that the stack does not have.
    """
    rows = x.reshape(-1, x.shape[-1])
    stacks = [w if layer is not None else w[None] for w in weights]
    columns = [w.shape[1 if transposed else 2] for w in stacks]
    outputs = [jax.ShapeDtypeStruct((rows.shape[0], n), jnp.float32) for n in columns]
    run = native.call("linear", "linear_cpu", *outputs)
    index = jnp.int32(0) if layer is None else jnp.asarray(layer, jnp.int32)
    results = run(rows, index, *stacks, transposed=transposed)
    return [y.astype(dtype).reshape(*x.shape[:-1], n) for y, n in zip(results, columns, strict=True)]
