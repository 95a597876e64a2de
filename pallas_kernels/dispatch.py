"""Which implementation of the operations runs: chosen once, carried in the static spec."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax

from .once import once

# with the platform that it is made for, None = any
IMPLEMENTATIONS = {"xla": None, "triton": "gpu", "mosaic_tpu": "tpu", "cpu": "cpu"}
PALLAS = ("triton", "mosaic_tpu")


@dataclass(frozen=True)
class Kernels:
    """A resolved choice. Make it with `Kernels.resolve`.

    Attributes:
        implementation: "xla" (plain jax.numpy), "triton" (Pallas, NVIDIA and AMD GPUs) or
            "mosaic_tpu" (Pallas, TPU) or "cpu" (C++).
        interpret: run Pallas kernels in the interpreter, on any platform: slow, for tests.
            "checked" makes the interpreter of TPU kernels also look for races and reads outside of
            arrays.
    """

    implementation: str = "xla"
    interpret: bool | Literal["checked"] = False

    @staticmethod
    def resolve(
        implementation: str | None = None, *, interpret: bool | Literal["checked"] = False
    ) -> "Kernels":
        """None: the kernels of the platform that the program will run on, plain XLA without any.

        Raises:
            ValueError: the name is unknown, its platform is not the one at hand and `interpret` is
                not set, or it needs a C++ compiler and there is none.
        """
        platform = target_platform()
        if implementation is None:
            return Kernels(_default(platform), interpret)
        if not isinstance(implementation, str) or implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}, "
                "or None to choose by platform"
            )
        needs = IMPLEMENTATIONS[implementation]
        if needs not in (None, platform) and not interpret:
            raise ValueError(
                f"implementation={implementation!r} needs a {needs.upper()}, and this program runs "
                f"on {platform.upper()}; leave it out, take 'xla', or set interpret=True to run "
                "the kernels slowly in the interpreter"
            )
        if implementation == "cpu" and (reason := _no_native_kernels()):
            raise ValueError(
                f"implementation='cpu' builds its kernels on first use: {reason}; or take 'xla'"
            )
        return Kernels(implementation, interpret)

    @property
    def meta_dtype(self) -> str:
        """How the kernels want float16 metadata kept: TPU kernels as int16 bits, and a bitcast of
        the pool would be a copy there.
        """
        return "int16" if self.implementation == "mosaic_tpu" else "float16"

    @property
    def tokens_per_block(self) -> int:
        """Lanes of a page that the kernels want: 128 on TPU, where the last axis is padded to 128;
        else 32 (docs/design.md 2).
        """
        return 128 if self.implementation == "mosaic_tpu" else 32


XLA = Kernels()


@dataclass(frozen=True)
class Operation:
    """One operation of the cache, and what runs it.

    Attributes:
        reference: the function in plain jax.numpy, which can do all.
        kernels: imports and gives the function of "triton", "mosaic_tpu" or "cpu".
        supports: implementation and layout of the pages to why those kernels cannot do it there;
            None where they can.
    """

    reference: Callable[..., Any]
    kernels: Callable[[str], Callable[..., Any]]
    supports: Callable[[str, Any], str | None] = lambda implementation, layout: None

    def chosen(self, kernels: Kernels, layout: Any = None) -> Kernels:
        """What runs it on pages of a layout: `kernels`, or plain XLA where they cannot."""
        if kernels.implementation == "xla" or self.supports(kernels.implementation, layout):
            return XLA
        return kernels

    def on(self, kernels: Kernels, layout: Any = None) -> Callable[..., Any]:
        """The function that runs it (see `chosen`)."""
        kernels = self.chosen(kernels, layout)
        if kernels == XLA:
            return self.reference
        found = self.kernels(kernels.implementation)
        if kernels.implementation in PALLAS:
            return partial(found, interpret=kernels.interpret)
        return found


def _default(platform: str) -> str:
    """The implementation made for a platform; plain XLA without one, or without a compiler."""
    if platform == "cpu" and _no_native_kernels():
        return "xla"
    return next((name for name, made_for in IMPLEMENTATIONS.items() if made_for == platform), "xla")


@once
def _no_native_kernels() -> str | None:
    """Why native CPU kernels cannot be built, said once in the log; None when they can."""
    from .native.build import why_unavailable

    reason = why_unavailable()
    if reason:
        logging.getLogger(__name__).warning(
            "plain XLA instead of native CPU kernels, which are several times faster: %s", reason
        )
    return reason


def tpu_interpreter(interpret: bool | Literal["checked"]):
    """`interpret` as `pl.pallas_call` of a TPU kernel takes it."""
    if interpret != "checked":
        return interpret
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the abstract mesh in force when code is compiled ahead of time for
    absent devices, else the default.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return "tpu" if "TPU" in device.device_kind.upper() else "gpu"
