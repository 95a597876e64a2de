"""The implementations that every test of an operation runs over, against the same reference.

Larger cases of interpreted TPU kernels take 5 to 20 s each: tests mark them `SLOW`, or `LONG` where
CI runs other cases of the same code.
"""

from collections.abc import Mapping
from typing import Any

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
SLOW = pytest.mark.slow
LONG = (pytest.mark.slow, pytest.mark.long)


def marked(params: list, **marks: Any) -> list:
    """The params of IMPLEMENTATIONS, those named by `marks` with these marks: `mosaic_tpu=SLOW`."""
    return [pytest.param(*p.values, id=p.id, marks=marks.get(p.id, ())) for p in params]


def crossed(first: list, second: list, marks: Mapping[tuple[str, str], Any]) -> list:
    """Each param of `first` with each of `second`, the ids joined by a dash. A pair of ids has the
    marks that `marks` gives it, other pairs those of their params.
    """
    return [
        pytest.param(
            *a.values,
            *b.values,
            id=f"{a.id}-{b.id}",
            marks=marks.get((a.id, b.id), (*a.marks, *b.marks)),
        )
        for a in first
        for b in second
    ]
