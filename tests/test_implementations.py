"""`generate()` with every implementation of the cache's operations: the same tokens, the same
tiers, and clear refusals.
"""

import functools

import numpy as np
import pytest

from diffkv_jax import GenerateOutput, diffkv, generate, quantized
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.testing.readback import check_pool, page_ids_in_use
from diffkv_jax.testing.tiny import prompt, tiny_model

NEW, PROMPTS = 20, [prompt(90, 1), prompt(37, 2)]
POLICIES = {
    "diffkv": diffkv(alpha_high=1.5, alpha_low=0.4, window=16, flush=8, queries=16),
    "one tier, nothing dropped": quantized("K8V4", window=16, flush=8),
}
needs_compiler = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
KERNELS = [
    pytest.param(Kernels("triton", True), id="triton", marks=pytest.mark.slow),
    pytest.param(Kernels("mosaic_tpu", True), id="mosaic_tpu", marks=pytest.mark.slow),
    pytest.param(Kernels("cpu"), id="cpu", marks=needs_compiler),
]


@functools.cache
def run(policy: str, kernels: Kernels) -> GenerateOutput:
    """Prompts in two chunks, then enough tokens for two compression events."""
    options = dict(policy=POLICIES[policy], max_new_tokens=NEW, prefill_chunk=64, max_len=128)
    return generate(
        *tiny_model(),
        PROMPTS,
        implementation=kernels.implementation,
        interpret=bool(kernels.interpret),
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_same_tokens(kernels: Kernels, policy: str):
    got, wanted = run(policy, kernels), run(policy, Kernels("xla"))
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    cache, plain = got.cache, wanted.cache
    assert cache.spec.kernels == kernels and plain.spec.kernels == Kernels("xla")
    np.testing.assert_array_equal(cache.stored.tier_len, plain.stored.tier_len)
    np.testing.assert_array_equal(cache.counters.seq_len, plain.counters.seq_len)
    np.testing.assert_array_equal(cache.counters.recent_len, plain.counters.recent_len)
    np.testing.assert_allclose(cache.recent.k, plain.recent.k, rtol=1e-4, atol=1e-4)
    if cache.spec.layout.scored:
        assert (
            np.asarray(cache.stored.tier_len).sum()
            < np.asarray(cache.counters.seq_len - cache.counters.recent_len).sum() * 2
        ).any(), "some must be dropped"
        np.testing.assert_allclose(
            cache.recent.significance, plain.recent.significance, rtol=1e-3, atol=1e-5
        )
    page_ids_in_use(
        cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.spec.num_pages
    )
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)


def test_default_is_that_of_the_platform():
    assert Kernels.resolve() == Kernels("xla" if why_unavailable() else "cpu")
    assert (
        Kernels("mosaic_tpu").tokens_per_block == 128 and Kernels("triton").tokens_per_block == 32
    )


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("cuda", "one of xla, triton, mosaic_tpu, cpu"),
        ("triton", "needs a GPU.*runs on CPU"),
        ("mosaic_tpu", "needs a TPU.*runs on CPU"),
    ],
)
def test_refused_before_any_work(implementation: str, message: str):
    with pytest.raises(ValueError, match=message):
        generate(*tiny_model(), PROMPTS, max_new_tokens=2, implementation=implementation)


@pytest.mark.slow
def test_fixed_by_the_cache():
    out = run("diffkv", Kernels("xla"))
    with pytest.raises(ValueError, match="implementation beside cache="):
        generate(*tiny_model(), PROMPTS, cache=out.cache, implementation="xla")
