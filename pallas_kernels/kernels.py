"""Which implementation of the cache's operations runs: chosen once, carried in the cache's static spec."""

from dataclasses import dataclass
from typing import Literal

import jax

IMPLEMENTATIONS = {"xla": None, "triton": "gpu", "mosaic_tpu": "tpu"}  # each with the platform that it is made for, None = any
_DEFAULT = {"gpu": "triton", "tpu": "mosaic_tpu"}


@dataclass(frozen=True)
class Kernels:
    """A resolved choice. Make it with `Kernels.resolve`.

    Attributes:
        implementation: "xla" (plain jax.numpy), "triton" (Pallas, NVIDIA and AMD GPUs) or "mosaic_tpu" (Pallas, TPU).
        interpret: run Pallas kernels in the interpreter, on any platform: slow, for tests. "checked" makes the interpreter of TPU
            kernels also look for races and reads outside of arrays.
    """

    implementation: str = "xla"
    interpret: bool | Literal["checked"] = False

    @staticmethod
    def resolve(implementation: str | None = None, *, interpret: bool | Literal["checked"] = False) -> "Kernels":
        """None takes the kernels of the platform that the program will run on, plain XLA where there are none.

        Raises:
            ValueError: the name is unknown, or its platform is not the one at hand and `interpret` is not set.
        """
        platform = target_platform()
        if implementation is None:
            return Kernels(_DEFAULT.get(platform, "xla"), interpret)
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}, or None to choose by platform"
            )
        needs = IMPLEMENTATIONS[implementation]
        if needs not in (None, platform) and not interpret:
            raise ValueError(
                f"implementation={implementation!r} needs a {needs.upper()}, and this program runs on {platform.upper()}; "
                "leave it out, take 'xla', or set interpret=True to run the kernels slowly in the interpreter"
            )
        return Kernels(implementation, interpret)

    @property
    def meta_dtype(self) -> str:
        """How the kernels want float16 metadata kept: TPU kernels as int16 bits, and a bitcast of the pool would be a copy there."""
        return "int16" if self.implementation == "mosaic_tpu" else "float16"

    @property
    def tokens_per_block(self) -> int:
        """Lanes of a page that the kernels want: 128 on TPU, where the last axis is padded to 128; else 32 (docs/design.md 2)."""
        return 128 if self.implementation == "mosaic_tpu" else 32


XLA = Kernels()


def tpu_interpreter(interpret: bool | Literal["checked"]):
    """`interpret` as `pl.pallas_call` of a TPU kernel takes it."""
    if interpret != "checked":
        return interpret
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", dma_execution_mode="on_wait")


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the abstract mesh in force when code is compiled ahead of time for absent devices, else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return "tpu" if "TPU" in device.device_kind.upper() else "gpu"
