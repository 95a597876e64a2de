"""A change behind a condition, in place on every platform."""

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import Array, lax

from .dispatch import target_platform

State = TypeVar("State")


def when(condition: Array, change: Callable[[State], State], state: State) -> State:
    """`change(state)` if the condition (bool []) holds, else `state`, which holds the pool.

    A loop of one turn or none: XLA for CPU and GPU updates the pool in place in a loop, but copies
    it in the branches of a condition. XLA for TPU copies in neither, and takes minutes to compile
    such loops inside the loop over layers.
    """
    if target_platform() == "tpu":
        return lax.cond(condition, change, lambda state: state, state)
    return lax.fori_loop(0, condition.astype(jnp.int32), lambda _, state: change(state), state)
