"""Which kernels run which operation on which pages, and that nothing of them is imported before."""

import subprocess
import sys

import pytest

from diffkv_jax.pallas_kernels.apply_event import APPLY_EVENT
from diffkv_jax.pallas_kernels.apply_event.event import apply_event as plain_event
from diffkv_jax.pallas_kernels.codecs import KVFormat, LatentFormat
from diffkv_jax.pallas_kernels.decode_attention import DECODE_ATTENTION
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.pallas_kernels.plan_event import COUNT_MOVES
from diffkv_jax.pallas_kernels.prefill_attention import COLUMN_SUMS, PREFILL_ATTENTION

KERNELS = [Kernels("triton", True), Kernels("mosaic_tpu", True), Kernels("cpu")]
OF_PAGES = [PREFILL_ATTENTION, COLUMN_SUMS, APPLY_EVENT, COUNT_MOVES]


def layout_of(*tiers: str, **options) -> PageLayout:
    formats = [KVFormat.parse(tier) for tier in tiers]
    return PageLayout.solve(formats, options.pop("head_dim", 64), **options)


EVERYWHERE = {
    "uniform": layout_of("K8V4", "K4V2"),
    "groups": layout_of("K4g32V4g32"),
    "normal and exact": layout_of("full", "K4nV2n"),
    "128 lanes": layout_of("K8V8", tokens=128, meta_dtype="int16"),
}
IN_DECODE = {
    "codebooks": layout_of("K8v4V8v4"),
    "levels": layout_of("K4sV4t"),
    "outliers of tokens": layout_of("K4sV4t+o1"),
    "outliers of uniform": layout_of("K4V4+o2"),
    "without rope": layout_of("K8V4", rope=(1.0, 0.5)),
}
NOWHERE = {
    "per channel": layout_of("K2cV2g32"),
    "low rank": layout_of("K4V4+r4"),
    "one of two tiers": layout_of("full", "K4V4+r4"),
    "latent": PageLayout.solve([LatentFormat.of(KVFormat.parse("K8V8"), 48, "float32")], 64),
}


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.implementation)
def test_what_runs_where(kernels: Kernels):
    for cases, decode, pages in ((EVERYWHERE, True, True), (IN_DECODE, True, False)):
        for name, layout in cases.items():
            assert (DECODE_ATTENTION.chosen(kernels, layout) == kernels) is decode, name
            for operation in OF_PAGES:
                assert operation.chosen(kernels, layout) == (kernels if pages else XLA), name
    for name, layout in NOWHERE.items():
        for operation in (DECODE_ATTENTION, *OF_PAGES):
            assert operation.chosen(kernels, layout) == XLA, name
            assert operation.supports(kernels.implementation, layout), f"{name}: says why"


def test_the_function_is_that_of_the_kernels():
    layout = EVERYWHERE["uniform"]
    found = [APPLY_EVENT.on(kernels, layout) for kernels in KERNELS]
    modules = [getattr(run, "func", run).__module__.rpartition(".")[2] for run in found]
    assert modules == ["triton", "mosaic_tpu", "cpu"]
    assert APPLY_EVENT.on(XLA, layout) is plain_event
    assert APPLY_EVENT.on(KERNELS[0], IN_DECODE["levels"]) is plain_event


def test_nothing_is_counted_where_nothing_has_a_score():
    unscored = layout_of("K8V4", scored=False)
    assert COUNT_MOVES.chosen(KERNELS[0], unscored) == XLA
    assert APPLY_EVENT.chosen(KERNELS[0], unscored) == KERNELS[0]


def test_kernels_are_imported_when_they_run():
    code = "import sys, diffkv_jax; print('jax.experimental.pallas' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
