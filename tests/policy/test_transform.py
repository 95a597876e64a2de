"""The rotated cache: nothing changes where tokens are exact, and codecs with few bits lose less."""

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.policy.transform import rotated, rotation
from diffkv_jax.testing.quantiser import dequantise, quantise
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import tiny_model

TOKENS = np.random.default_rng(2).integers(0, 97, (2, 120))


@pytest.mark.parametrize("head_dim", [64, 80])
def test_the_matrix_is_orthogonal(head_dim):
    np.testing.assert_allclose(
        rotation(head_dim) @ rotation(head_dim).T, np.eye(head_dim), atol=1e-6
    )
    x = np.random.default_rng(0).normal(size=(3, head_dim)).astype(np.float32)
    np.testing.assert_allclose(rotated(rotated(x), back=True), x, atol=1e-5)
    assert np.abs(np.asarray(rotated(x)) - x).max() > 1
    # one channel spreads over all
    largest = np.abs(rotated(np.eye(head_dim, dtype=np.float32)[:1])).max()
    assert largest < 0.5


@pytest.mark.slow
def test_exact_tokens_give_the_same_text():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    outputs = [
        teacher_forced(
            model,
            params,
            TOKENS,
            100,
            dkv.CompressionPolicy(
                "exact", transform=transform, schedule=dkv.Schedule(window=16, flush=8)
            ),
        )
        for transform in (dkv.Exact(), dkv.Hadamard())
    ]
    np.testing.assert_allclose(outputs[0][0], outputs[1][0], atol=2e-4)
    plain, turned = (held_tokens(cache, 0, 0, 1) for _, cache in outputs)
    for at in (0, 50, 118):  # stored tokens and the window
        np.testing.assert_allclose(plain[at][1] @ rotation(32), turned[at][1], atol=1e-4)
        np.testing.assert_allclose(plain[at][2] @ rotation(32), turned[at][2], atol=1e-4)


@pytest.mark.slow
def test_norms_do_not_turn():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    options = {"window": 16, "flush": 8, "sinks": 2}
    plain, turned = (
        dkv.generate(
            model,
            params,
            TOKENS,
            policy=dkv.key_norm(0.5, whole_layers=(), transform=transform, **options),
            max_new_tokens=1,
        ).cache
        for transform in (dkv.Exact(), dkv.Hadamard())
    )
    assert set(held_tokens(plain, 0, 1, 0)) == set(held_tokens(turned, 0, 1, 0))


def test_large_channels_cost_less():
    keys = np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32)
    keys[:, 5] *= 30

    def error(x: np.ndarray) -> float:
        return float(np.square(dequantise(*quantise(x, 4, 1)) - x).mean())

    assert error(np.asarray(rotated(keys))) < 0.2 * error(keys)
