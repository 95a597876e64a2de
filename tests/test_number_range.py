"""Keys and values of any size: a model whose k_proj and v_proj are scaled, and q_proj and o_proj by
the inverse, is the same model.
"""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation.forcing import _feed
from diffkv_jax.make_cache import make_cache
from diffkv_jax.methods.registry import NAMED
from diffkv_jax.pallas_kernels.codecs import KVFormat, shared_format
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.read_prompts import prefill
from diffkv_jax.testing.tiny import tiny_model

PROMPT, FED, LAYERS = 96, 16, 4
TOKENS = np.random.default_rng(5).integers(0, 97, (1, PROMPT + FED))
PLAIN = dkv.CompressionPolicy.none(window=16)
CALIBRATION = np.random.default_rng(6).integers(0, 97, (2, 64))


@lru_cache
def model_of(size: float):
    """(model, params) whose keys and values are `size` times as large, its logits those of size
    1.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32, layers=LAYERS)
    factors = {"q_proj": 1 / size, "k_proj": size, "v_proj": size, "o_proj": 1 / size}
    attention = {
        name: jax.tree.map(lambda x, by=by: x * np.float32(by), params["layers"]["self_attn"][name])
        for name, by in factors.items()
    }
    layers = params["layers"]
    return model, params | {"layers": layers | {"self_attn": layers["self_attn"] | attention}}


def named(name: str) -> dkv.CompressionPolicy:
    """A named policy or tier, with a window that the few tokens here leave."""
    policy = NAMED[name]() if name in NAMED else dkv.quantized(name)
    # GEAR: 64 of the 96 tokens of the prompt leave
    schedule = dkv.Schedule(window=16, flush=policy.group or 8, group=policy.schedule.group)
    return dataclasses.replace(policy, schedule=schedule)


@lru_cache
def log_probs(
    policy: dkv.CompressionPolicy, size: float, implementation: str = "xla"
) -> np.ndarray:
    """float64 [FED, vocab] of a model fed through the cache."""
    model, params = model_of(size)
    learns = any(fmt.learned for fmt in policy.formats("float32"))
    calibration = (
        dkv.calibrate(model, params, CALIBRATION, policy, iterations=3, progress=False)
        if learns
        else None
    )
    cache = make_cache(
        model, policy, [PROMPT + FED + 1], kernels=Kernels(implementation), calibration=calibration
    )
    _, cache = prefill(model, params, cache, TOKENS[:, :PROMPT], np.array([PROMPT]), 128)
    fed, _ = _feed(model, params, cache, jnp.asarray(TOKENS[:, PROMPT:].T), jnp.ones(FED, bool))
    return np.asarray(fed, np.float64)[:, 0]


def divergence(full: np.ndarray, found: np.ndarray) -> float:
    """Mean KL divergence of `found` from `full`."""
    return float((np.exp(full) * (full - found)).sum(axis=-1).mean())


def check(name: str, size: float, implementation: str = "xla") -> None:
    """As far from the full cache as the policy is on the model of size 1, and near to what it gives
    there.
    """
    policy, full = named(name), log_probs(PLAIN, 1.0)
    assert divergence(full, log_probs(PLAIN, size)) < 1e-6
    before, after = log_probs(policy, 1.0, implementation), log_probs(policy, size, implementation)
    allowed = divergence(full, before)
    assert divergence(full, after) <= 1.4 * allowed + 1e-3
    # other tables, as far from the full cache
    learns = any(fmt.learned for fmt in policy.formats("float32"))
    assert divergence(before, after) <= (2.5 if learns else 0.7) * allowed + 1e-3


QUICK = ["K8V4", "turboquant", "kivi", "gear"]
PLATFORMS = ["xla"] if why_unavailable() else ["xla", "cpu"]


@pytest.mark.daily(9)
@pytest.mark.parametrize("size", [1e6, 1e-8])
@pytest.mark.parametrize("name", QUICK)
def test_large_and_small_keys_and_values(name: str, size: float):
    check(name, size)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("size", [1e5, 1e9, 1e18, 1e-12])
@pytest.mark.parametrize("name", NAMED)
def test_every_named_policy(name: str, size: float):
    check(name, size)


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in PLATFORMS, reason="no native kernels here")
@pytest.mark.parametrize("size", [1e6, 1e-8, 1e30])
@pytest.mark.parametrize("name", ["K8V4", "K8V8", "diffkv_rotated", "turboquant", "kvquant"])
def test_native_kernels(name: str, size: float):
    check(name, size, "cpu")


BLOCK = np.random.default_rng(3).normal(size=(2, 3, 64, 32)) + 2 * np.random.default_rng(4).normal(
    size=(64, 1)
)
CODECS = ("K4cV4g16", "K2cV2g32+o5+r2", "K4V4+o5", "K8v4V4t", "K4sV4t+o5", "K4nV8")


def encode_and_decode(fmt: KVFormat, x: np.ndarray, size: float) -> list[np.ndarray]:
    """What a format gives back of blocks `x [B, n, d, T]` times `size` as keys and as values, over
    `size`.
    """
    fmt, rng, found = fmt.for_block(64, 32), np.random.default_rng(0), []
    for codec in (fmt.key, fmt.value):
        shape = codec.table_shape(64)
        if shape is not None:
            ranged = len(shape) == 1
            table = (
                np.sort(rng.uniform(-1, 1, (2, *shape)), axis=-1)
                if ranged
                else rng.normal(size=(2, *shape)) * 3 * size
            )
            table = table if ranged or shape[-1] > 1 else np.sort(table, axis=-2)
            codec = codec.with_table(jnp.asarray(table, jnp.float16 if ranged else jnp.bfloat16))
        payload, meta = jax.jit(codec.encode)(jnp.asarray(x * size, jnp.float32))
        merged = (
            jnp.moveaxis(part, 1, 2).reshape(2, part.shape[2], 3 * 32) for part in (payload, meta)
        )
        decoded = np.asarray(jax.jit(codec.decode)(*merged), np.float64) / size
        found.append(np.moveaxis(decoded.reshape(2, 64, 3, 32), 2, 1))
    return found


@pytest.mark.daily(8)
@pytest.mark.parametrize("size", [2.0**40, 2.0**99, 2.0**-30])
@pytest.mark.parametrize("name", CODECS)
def test_codecs_of_blocks_scale(name: str, size: float):
    """What is read back comes as near to what is stored, whatever its size."""
    fmt = KVFormat.parse(name)
    for found, wanted in zip(
        encode_and_decode(fmt, BLOCK, size), encode_and_decode(fmt, BLOCK, 1.0), strict=True
    ):
        assert np.square(found - BLOCK).mean() < 1.1 * np.square(wanted - BLOCK).mean()


@pytest.mark.parametrize("size", [2.0**40, 2.0**99, 2.0**-60])
def test_layers_that_share_directions(size: float):
    """MiniCache: the norms of both layers are kept whatever they are."""
    fmt = shared_format(KVFormat.parse("K8V8"), 0.6).for_block(64, 32)
    x = np.concatenate([BLOCK, 3 * BLOCK[::-1]], axis=-2)
    one, other = (
        np.asarray(fmt.key.decode(*jax.jit(fmt.key.encode)(jnp.asarray(x * by, jnp.float32)))) / by
        for by in (size, 1.0)
    )
    np.testing.assert_allclose(one, other, rtol=0.01, atol=1e-3)
    assert np.abs(other).max() > 3


@pytest.mark.slow
def test_keys_with_one_huge_channel():
    """Per token they take the range from the others; per channel (KIVI) they do not, and nothing is
    lost.
    """
    x = np.array(BLOCK, np.float32)
    x[..., 5, :] *= 1e8
    (found, *_) = encode_and_decode(KVFormat.parse("K4cV4"), x, 1.0)
    plain = encode_and_decode(KVFormat.parse("K4cV4"), BLOCK, 1.0)[0]
    others = np.arange(64) != 5
    np.testing.assert_array_equal(found[..., others, :], plain[..., others, :])
    assert np.abs(found - x)[..., 5, :].max() < 0.05 * np.ptp(x[..., 5, :])
    for fmt in ("K8V4", "K4nV4n", "K4V4+o5"):
        for read in encode_and_decode(KVFormat.parse(fmt), x, 1.0):
            assert (
                np.isfinite(read).all() and np.abs(read[..., 5, :] / x[..., 5, :] - 1).max() < 0.2
            )
