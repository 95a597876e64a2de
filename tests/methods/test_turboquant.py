"""TurboQuant: levels for the normal distribution, what they cost beside integer codes, and the
method in a cache.
"""

import jax
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.pallas_kernels.codecs import KVFormat, Normal
from diffkv_jax.pallas_kernels.codecs.normal import LEVELS
from diffkv_jax.policy.transform import rotated
from diffkv_jax.testing.normal_levels import (
    dequantise_normal,
    lloyd_max,
    quantise_normal,
    rounded_levels,
)
from diffkv_jax.testing.quantiser import dequantise, quantise
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import tiny_model

# mean squared error on N(0, 1): J. Max, 1960, table 1
PUBLISHED = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
TOKENS = np.random.default_rng(3).integers(0, 97, (2, 120))


def error_on_normal(levels) -> float:
    """Mean squared error of the levels and their mirror images on N(0, 1), by summing over a
    grid.
    """
    x = np.linspace(0, 10, 200_001)
    density = np.exp(-(x**2) / 2)
    nearest = np.abs(x - np.asarray(levels)[:, None]).min(axis=0)
    return float((density * nearest**2).sum() / density.sum())


@pytest.mark.parametrize("bits", PUBLISHED)
def test_the_iteration_finds_the_published_error(bits):
    assert error_on_normal(lloyd_max(bits)) == pytest.approx(PUBLISHED[bits], rel=1e-3)
    assert error_on_normal(lloyd_max(bits) * 1.05) > PUBLISHED[bits] * 1.003


@pytest.mark.parametrize("bits", LEVELS)
def test_the_table_is_the_iteration_in_bfloat16(bits):
    np.testing.assert_array_equal(LEVELS[bits], rounded_levels(bits))
    assert error_on_normal(LEVELS[bits]) < 1.0005 * error_on_normal(lloyd_max(bits))


def keys(head_dim: int = 64, spread: float = 1.0) -> np.ndarray:
    """Rotated normal draws float32 [400, head_dim], whose channels differ in size by factors of
    exp(spread).
    """
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, head_dim)) * np.exp(spread * rng.normal(size=head_dim))
    return np.asarray(rotated(x.astype(np.float32)))


def read_back(codec, x: np.ndarray) -> np.ndarray:
    """`x [T, d]` as the library encodes and decodes it."""
    return np.asarray(jax.jit(lambda x: codec.decode(*codec.encode(x)))(x.T)).T


@pytest.mark.parametrize(
    "bits, head_dim, most",
    [(1, 64, 0.2), (2, 64, 0.65), (2, 128, 0.55), (4, 128, 0.97), (4, 256, 0.85)],
)
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_rotated_keys_lose_less_than_with_integer_codes(bits, head_dim, most, spread):
    """Near the published error, too. Four-bit integers between a token's extremes lose less up to
    64 channels.
    """
    x = keys(head_dim, spread)

    def error(read: np.ndarray) -> float:
        return float(np.square(read - x).mean() / np.square(x).mean())

    levels, integers = error(read_back(Normal(bits), x)), error(dequantise(*quantise(x, bits)))
    assert levels < most * integers
    assert levels == pytest.approx(PUBLISHED[bits], rel=0.12)


@pytest.mark.parametrize("bits", LEVELS)
def test_the_norm_is_kept(bits):
    x = keys()
    norms = np.linalg.norm(read_back(Normal(bits), x), axis=1)
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=1), rtol=1e-3)  # float16 scales
    codes, scale = quantise_normal(x, bits)
    papers = np.linalg.norm(x, axis=1, keepdims=True) / 8  # norm / sqrt(d)
    if bits > 1:
        assert (
            np.abs(np.linalg.norm(dequantise_normal(codes, papers, bits), axis=1) / norms - 1).max()
            > 1e-2
        )


@pytest.mark.parametrize("bits, gains", [(1, 0.95), (2, 0.98), (4, 1.01)])
def test_a_kept_norm_is_worth_it_where_attention_is_sharp(bits, gains):
    """Output error of queries near a key: below that with the paper's scale at few bits, not above
    it at four.
    """
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 40, 256, 64))
    q = rng.normal(size=(40, 8, 64)) + np.take_along_axis(
        k, rng.integers(0, 256, (40, 8))[..., None], 1
    )

    def attention(k, v):
        logits = q @ k.swapaxes(1, 2) / 8
        p = np.exp(logits - logits.max(-1, keepdims=True))
        return p @ v / p.sum(-1, keepdims=True)

    def error(kept: bool) -> float:
        read = []
        for x in (k, v):
            codes, scale = quantise_normal(x, bits)
            read.append(
                dequantise_normal(
                    codes, scale if kept else np.linalg.norm(x, axis=-1, keepdims=True) / 8, bits
                )
            )
        return float(np.square(attention(*read) - attention(k, v)).mean())

    assert error(kept=True) < gains * error(kept=False)


@pytest.mark.parametrize("bits", LEVELS)
def test_tokens_without_size_and_what_is_no_number(bits):
    x = keys()[:8].copy()
    x[1], x[2, 3], x[4, 5] = 0, np.nan, np.inf
    read = read_back(Normal(bits), x)
    assert not read[1].any()
    assert not np.isfinite(read[[2, 4]]).any() and np.isfinite(read[[0, 1, 3, 5, 6, 7]]).all()


@pytest.mark.slow
def test_a_cache_holds_the_rotated_tokens_in_levels():
    """Layer 0, whose keys do not depend on the cache: stored tokens are the oracle's reading of the
    exact ones.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    exact = dkv.CompressionPolicy(
        "exact",
        tiers=("full",),
        transform=dkv.Hadamard(),
        schedule=dkv.Schedule(window=16, flush=8),
    )
    _, full = teacher_forced(model, params, TOKENS, 100, exact)
    _, cache = teacher_forced(model, params, TOKENS, 100, dkv.turboquant(4, window=16, flush=8))
    wanted, got = held_tokens(full, 0, 1, 1), held_tokens(cache, 0, 1, 1)
    stored = [position for position, token in got.items() if token[0] == "high"]
    assert len(stored) > 90 and set(got) == set(wanted)
    for tensor in (1, 2):
        x, y = (
            np.stack([tokens[position][tensor] for position in stored]) for tokens in (wanted, got)
        )
        same = dequantise_normal(*quantise_normal(x, 4), 4)
        # a value between two levels may fall to either
        assert np.isclose(y, same, rtol=2e-3).mean() > 0.995
        other = np.stack([wanted[position][3 - tensor] for position in stored])
        assert (
            np.isclose(y, dequantise_normal(*quantise_normal(other, 4), 4), rtol=2e-3).mean() < 0.2
        )


def test_the_policy():
    policy = dkv.turboquant(2)
    assert policy.tiers == ("K2nV2n",) and policy.transform == dkv.Hadamard()
    assert dkv.CompressionPolicy.from_json(policy.to_json()) == policy
    for name in ("K4nV4n", "K8V4n", "K1nV2:1,4"):
        assert KVFormat.parse(name).name == name
    assert KVFormat.parse("K4nV2n").token_bytes(64) == 32 + 2 + 16 + 2


@pytest.mark.parametrize("bits", [3, 8])
def test_bits_without_a_table_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits={bits} must be one of \(1, 2, 4\)"):
        dkv.turboquant(bits)


def test_groups_are_refused():
    with pytest.raises(ValueError, match="K4nV4:2,2.*4n has no groups a token"):
        KVFormat.parse("K4nV4:2,2")
