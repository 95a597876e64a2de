"""Keys kept without their rotary embedding: exact tokens give the same text, and what is kept does
not depend on the position.
"""

import dataclasses

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import tiny_model

TOKENS = np.random.default_rng(2).integers(0, 97, (2, 120))
BARE = dkv.CompressionPolicy(
    "bare", tiers=("full",), transform=dkv.WithoutRope(), schedule=dkv.Schedule(window=16, flush=8)
)


@pytest.mark.slow
def test_exact_tokens_give_the_same_text():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    outputs = [
        teacher_forced(
            model,
            params,
            TOKENS,
            100,
            dataclasses.replace(BARE, transform=transform),
            prefill_chunk=64,
        )[0]
        for transform in (dkv.Exact(), dkv.WithoutRope())
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=2e-4)


@pytest.mark.slow
def test_kept_keys_are_those_of_the_projection():
    """In the first layer a token's bare key depends on its id alone, and the embedding of the
    equations turns it to the cached one.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    same = np.full((1, 100), 7)
    bare, plain = (
        held_tokens(
            dkv.generate(model, params, same, policy=policy, max_new_tokens=1).cache, 0, 0, 1
        )
        for policy in (BARE, dataclasses.replace(BARE, transform=dkv.Exact()))
    )
    keys = np.stack([bare[at][1] for at in range(80)])
    np.testing.assert_allclose(keys, np.broadcast_to(keys[:1], keys.shape), atol=1e-4)
    frequencies = 10000.0 ** (-np.arange(16) / 16)
    for at in (3, 79):
        pairs = (keys[at, :16] + 1j * keys[at, 16:]) * np.exp(1j * at * frequencies)
        np.testing.assert_allclose(
            np.concatenate([pairs.real, pairs.imag]), plain[at][1], atol=1e-4
        )
    assert np.abs(plain[3][1] - plain[79][1]).max() > 0.1
