"""Key norm: budgets are kept whatever the keys are, and memory is freed."""

import numpy as np
import pytest
from tiny_llama import PROMPT

import diffkv_jax as dkv
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import tiny_model


@pytest.mark.slow
def test_equal_tokens_do_not_burst_a_budget():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policy = dkv.key_norm(0.25, whole_layers=(), sinks=2, window=16)
    cache = dkv.generate(model, params, np.full((1, 200), 7), policy=policy, max_new_tokens=1).cache
    held = [set(held_tokens(cache, layer, 0, head)) for layer in range(2) for head in range(2)]
    assert [len(positions) for positions in held] == [50] * 4
    assert all({0, 1, *range(184, 200)} <= positions for positions in held)


@pytest.mark.slow
def test_memory_is_freed():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    long = np.tile(PROMPT, 4)[None]
    reports = [
        dkv.memory_report(
            dkv.generate(
                model, params, long, policy=dkv.key_norm(keep, whole_layers=()), max_new_tokens=1
            ).cache
        )
        for keep in (1.0, 0.25)
    ]
    pages = [report.pages.sum() for report in reports]
    assert pages[1] < 0.3 * pages[0]
