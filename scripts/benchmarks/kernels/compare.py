"""One operation of the cache timed in both implementations, and whether they agree at that size."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.common.report import Row
from benchmarks.common.states import Setting
from benchmarks.common.timing import Effort, Runner, interleaved
from benchmarks.kernels.correct import verdict
from diffkv_jax.pallas_kernels.dispatch import Kernels

LIMIT = 2e-2  # of `error`: here XLA multiplies in tf32 and the kernels in bfloat16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the operations are timed on: requests, stored tokens a head, layers of an event, chunk
    and its observing rows, blocks.
    """

    batch: int = 16
    context: int = 8192
    event_layers: int = 4
    prompts: int = 4
    chunk: int = 1024
    observe: int = 64
    flush: int = 32
    blocks: int = 8192


def compare(
    setting: Setting,
    runner: Callable[[Kernels], Runner],
    effort: Effort,
    amount: float,
    unit: str,
    result: Callable[[Any], Array] | None = None,
) -> Row:
    """Both implementations in turns; `amount` a step in units of 1e-9 `unit`. `result` of a state
    is the same after any number of steps.
    """
    runners = {name: runner(kernels) for name, kernels in setting.pairs().items()}
    times = interleaved(runners, effort)
    ours, xla = times[setting.kernels.implementation], times["xla"]
    checked = (
        verdict(relative(*(result(each.state) for each in runners.values())), LIMIT)
        if result
        else {}
    )
    return {
        **{name: checked[name] for name in ("error", "status") if checked},
        "triton us": ours.median * 1e6,
        "spread": ours.spread,
        "xla us": xla.median * 1e6,
        "xla spread": xla.spread,
        "speed-up": xla.median / ours.median,
        "rate": amount / ours.median * 1e-9,
        "unit": unit,
    }


@jax.jit
def relative(got: Array, wanted: Array) -> Array:
    """`||got - wanted|| / ||wanted||`, on the device."""
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)
