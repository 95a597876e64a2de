"""The implementations that every test of an operation runs over, against the same reference."""

import jax
import pytest

from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native.build import why_unavailable

INTERPRETED = {
    "xla": Kernels("xla"),
    "triton": Kernels("triton", True),
    "mosaic_tpu": Kernels("mosaic_tpu", True),
    # the interpreter that looks for races and reads outside of arrays
    "mosaic_tpu_checked": Kernels("mosaic_tpu", "checked"),
}
ON_DEVICE = {
    "gpu": {"triton_device": Kernels("triton")},
    "tpu": {"mosaic_tpu_device": Kernels("mosaic_tpu")},
    "cpu": {} if why_unavailable() else {"cpu": Kernels("cpu")},
}
IMPLEMENTATIONS = [
    pytest.param(k, id=name)
    for name, k in (INTERPRETED | ON_DEVICE.get(jax.default_backend(), {})).items()
]


NATIVE = [] if why_unavailable() else [pytest.param(Kernels("cpu"), id="cpu")]
