"""`generate` from prompt to tokens with every implementation: what CI runs on each minor version of
JAX in the supported range.
"""

from functools import cache

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.testing.tiny import prompt, tiny_model

INTERPRETED = ("triton", "mosaic_tpu")
NATIVE = pytest.param(
    "cpu", marks=pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")
)
POLICY = dkv.diffkv(3.0, 0.5, window=8, flush=4)


@cache
def run(implementation: str) -> dkv.GenerateOutput:
    """A prompt that is compressed, and decode steps with a compression event."""
    kernels = {"implementation": implementation, "interpret": implementation in INTERPRETED}
    return dkv.generate(*tiny_model(), [prompt(30, 3)], policy=POLICY, max_new_tokens=6, **kernels)


@pytest.mark.parametrize(
    "implementation",
    [NATIVE, *(pytest.param(name, marks=pytest.mark.slow) for name in INTERPRETED)],
)
def test_every_implementation_generates_the_same_tokens(implementation: str):
    got, wanted = run(implementation), run("xla")
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    np.testing.assert_array_equal(got.cache.stored.tier_len, wanted.cache.stored.tier_len)
    assert len(np.unique(wanted.tokens)) > 3
    stored = np.asarray(wanted.cache.stored.tier_len)
    assert stored.sum(axis=(0, 1, 2)).min() > 0, "both tiers are used"
    assert stored.sum() < 2 * int(
        (wanted.cache.counters.seq_len - wanted.cache.counters.recent_len)[0]
    ), "and some tokens dropped"
