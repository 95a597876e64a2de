"""Policies of which kernels know only decode attention: the same tokens as in plain XLA, said in
the log, refused where none does.
"""

import logging
from functools import lru_cache

import jax
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax import GenerateOutput
from diffkv_jax.cache.cache import table_shapes
from diffkv_jax.cache.kernels import kernels_for
from diffkv_jax.calibration.calibration import fingerprint
from diffkv_jax.pallas_kernels.dispatch import PALLAS, XLA, Kernels
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.testing.readback import check_pool
from diffkv_jax.testing.tiny import prompt, tiny_model

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
PROMPTS = [prompt(90, 1), prompt(37, 2)]
SHORT = {"window": 16, "flush": 8}
POLICIES = {
    "CQ": dkv.coupled_quantization(4, 8, **SHORT),
    "KVQuant": dkv.kvquant(3, **SHORT),
    "KVQuant without outliers": dkv.kvquant(3, 0, **SHORT),
    "CQ of what H2O keeps": dkv.h2o(0.5, tiers=("K4v2V4v2",), **SHORT),
    "uniform, without rope": dkv.CompressionPolicy(
        "bare", tiers=("K8V4",), transform=dkv.WithoutRope(), schedule=dkv.Schedule(**SHORT)
    ),
}


def random_calibration(
    model, params, policy: dkv.CompressionPolicy, seed: int
) -> dkv.Calibration | None:
    """Tables of random numbers, ascending: what they are does not matter here."""
    spec = dkv.CacheSpec.build(
        model.attention, policy, num_requests=1, max_len=64, num_pages=0, dtype="float32"
    )
    rng = np.random.default_rng(seed)

    def table(shape: tuple[int, ...] | None) -> np.ndarray | None:
        return (
            None
            if shape is None
            else np.sort(rng.normal(size=shape), axis=min(4, len(shape)) - 1).astype(np.float16)
        )

    tables = tuple((table(key), table(value)) for key, value in table_shapes(spec))
    if not jax.tree.leaves(tables):
        return None
    return dkv.Calibration(tables, policy.tiers, policy.transform, fingerprint(model, params))


@lru_cache
def run(name: str, implementation: str, seed: int = 1) -> GenerateOutput:
    """Two prompts, then enough tokens for two compression events."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policy = POLICIES[name]
    options = dict(
        policy=policy,
        max_new_tokens=20,
        max_len=128,
        calibration=random_calibration(model, params, policy, seed),
    )
    return dkv.generate(
        model,
        params,
        PROMPTS,
        implementation=implementation,
        interpret=implementation in PALLAS,
        **options,
    )


CASES = [
    ("CQ", "cpu"),
    *(pytest.param(name, "cpu", marks=pytest.mark.slow) for name in list(POLICIES)[1:]),
]
CASES += [
    pytest.param(name, "triton", marks=(pytest.mark.slow, pytest.mark.long))
    for name in ("CQ", "KVQuant")
]
CASES += [pytest.param("KVQuant", "mosaic_tpu", marks=(pytest.mark.slow, pytest.mark.long))]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_the_same_tokens(name: str, implementation: str):
    got, wanted = run(name, implementation), run(name, "xla")
    np.testing.assert_array_equal(got.tokens, wanted.tokens)
    cache, plain = got.cache, wanted.cache
    assert (cache.spec.kernels, cache.spec.event_kernels) == (
        Kernels(implementation, implementation in PALLAS),
        XLA,
    ) and plain.spec.kernels == XLA
    jax.tree.map(np.testing.assert_array_equal, cache.counters, plain.counters)
    np.testing.assert_array_equal(cache.stored.tier_len, plain.stored.tier_len)
    np.testing.assert_allclose(cache.recent.k, plain.recent.k, rtol=1e-4, atol=1e-4)
    if cache.spec.layout.scored:
        np.testing.assert_allclose(
            cache.recent.significance, plain.recent.significance, rtol=1e-3, atol=1e-5
        )
    assert int(np.asarray(cache.stored.tier_len).min()) > 0
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)


def test_other_codebooks_give_other_keys():
    """What the comparison of windows would see if a kernel read tables that are not the layer's and
    head's.
    """
    got, other = (run("CQ", "cpu", seed).cache.recent.k for seed in (1, 2))
    assert np.abs(np.asarray(got) - np.asarray(other)).max() > 0.01


def test_the_log_says_what_runs_where(caplog: pytest.LogCaptureFixture):
    attention = tiny_model(q_heads=4, kv_heads=2, head_dim=32)[0].attention
    with caplog.at_level(logging.INFO):
        assert (
            kernels_for(POLICIES["CQ"], attention)
            == kernels_for(POLICIES["CQ"], attention, "cpu")
            == Kernels("cpu")
        )
        assert (
            kernels_for(dkv.diffkv(), attention) == Kernels("cpu")
            and kernels_for(POLICIES["CQ"], attention, "xla") == XLA
        )
    said = [record.message for record in caplog.records]
    assert (
        said
        == [
            "policy 'cq_4c8b': decode attention runs on 'cpu', prefill attention and "
            "events in plain XLA"
        ]
        * 2
    )


def test_what_no_kernel_knows_is_refused():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    for policy in (dkv.kivi(), dkv.gear()):
        with pytest.raises(ValueError, match="plain XLA only"):
            dkv.generate(
                model, params, PROMPTS, policy=policy, implementation="cpu", max_new_tokens=1
            )
        assert kernels_for(policy, model.attention) == XLA
