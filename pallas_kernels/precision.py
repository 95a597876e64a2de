"""32 bits, whatever the process computes in."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
R = TypeVar("R")


def in_32_bits(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which computes in 32 bits also under `jax_enable_x64`: the same results.

    Pages, tables and kernels hold 32-bit numbers, and JAX would widen what is counted from them.
    64-bit JAX arrays among the arguments are narrowed as they are without `jax_enable_x64`; whole
    numbers beyond the range become its ends, so that no large token id turns into a valid one.
    """

    @wraps(function)
    def narrow(*args: P.args, **kwargs: P.kwargs) -> R:
        if not jax.config.read("jax_enable_x64"):
            return function(*args, **kwargs)
        args, kwargs = jax.tree.map(_narrowed, (args, kwargs))
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return narrow


def _narrowed(leaf: Any) -> Any:
    if (
        not isinstance(leaf, jax.Array)
        or jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        or leaf.dtype.itemsize < 8
    ):
        return leaf
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        signed = jnp.issubdtype(leaf.dtype, jnp.signedinteger)
        narrow = jnp.iinfo(jnp.int32 if signed else jnp.uint32)
        return jnp.clip(leaf, narrow.min, narrow.max).astype(narrow.dtype)
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf
