"""The recent window on the CPU: the native kernels of cpu.cc, in place.

Windows may have their heads on several axes, `[L, ..., N, d]`: XLA copies an array that is reshaped
on its way to a call that changes it.
"""

import jax
import jax.numpy as jnp
from jax import Array

from ..native import build


def append_recent(
    recent_k: Array, recent_v: Array, layer: Array, k: Array, v: Array, slot: Array
) -> tuple[Array, Array]:
    """`append_recent` of api.py.

    Raises:
        ValueError or jax.errors.JaxRuntimeError: when run, for a layer that there is none of.
    """
    run = build.call(
        "recent_window", "append_recent_cpu", *_like(recent_k, recent_v), aliases={0: 0, 1: 1}
    )
    new_k, new_v = run(
        recent_k,
        recent_v,
        jnp.asarray(layer, jnp.int32),
        k.astype(recent_k.dtype),
        v.astype(recent_v.dtype),
        slot,
    )
    return new_k, new_v


def shift_recent(
    recent_k: Array, recent_v: Array, significance: Array, layer: Array, shift: Array
) -> tuple[Array, Array, Array]:
    """`shift_recent` of api.py.

    Raises:
        ValueError or jax.errors.JaxRuntimeError: when run, for a layer that there is none of or a
            shift beyond the window.
    """
    windows = recent_k, recent_v, significance
    aliases = {i: i for i in range(len(windows))}
    run = build.call("recent_window", "shift_recent_cpu", *_like(*windows), aliases=aliases)
    new_k, new_v, scores = run(*windows, jnp.asarray(layer, jnp.int32), shift)
    return new_k, new_v, scores


def _like(*arrays: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
