"""A tier's number means nothing: one codec holds the same tokens as the only tier, as the high one
and as the low one.
"""

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import tiny_model

TOKENS = np.random.default_rng(2).integers(0, 97, (2, 130))
SCHEDULE = {"window": 16, "flush": 8}
ONLY = dkv.quantized("K4V2", **SCHEDULE)
HIGH = dkv.diffkv(0.0, 0.0, tiers=("K4V2", "K2V1"), queries=16, **SCHEDULE)
LOW = dkv.diffkv(1e9, 0.0, tiers=("K8V4", "K4V2"), queries=16, **SCHEDULE)


def held(policy: dkv.CompressionPolicy):
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    log_probs, cache = teacher_forced(model, params, TOKENS, 100, policy, prefill_chunk=128)
    tokens = {
        (row, head): held_tokens(cache, 1, row, head) for row in range(2) for head in range(2)
    }
    return (
        log_probs,
        tokens,
        {tier for by_position in tokens.values() for tier, *_ in by_position.values()},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "name"), [(HIGH, "high"), (LOW, "low")], ids=["high", "low"])
def test_the_same_tokens_under_another_number(policy, name):
    log_probs, only, _ = held(ONLY)
    other_log_probs, other, tiers = held(policy)
    assert tiers == {name, "recent"}
    np.testing.assert_allclose(other_log_probs, log_probs, atol=1e-5)
    for at, by_position in only.items():
        assert set(by_position) == set(other[at]) == set(range(130))
        for position, (_, k, v, _) in by_position.items():
            np.testing.assert_array_equal(other[at][position][1], k)
            np.testing.assert_array_equal(other[at][position][2], v)
