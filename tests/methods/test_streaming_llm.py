"""StreamingLLM: what is left after decode events."""

from tiny_llama import PROMPT

import diffkv_jax as dkv
from diffkv_jax.testing.readback import check_pool, held_tokens
from diffkv_jax.testing.tiny import tiny_model


def test_streaming_goes_on_in_decode():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policy = dkv.streaming_llm(48, sinks=4, window=16, flush=8)
    out = dkv.generate(model, params, PROMPT[None, :100], policy=policy, max_new_tokens=41)
    assert int(out.cache.counters.seq_len[0]) == 140
    for head in range(2):  # the last event was at 140 tokens: 4 sinks and the 44 most recent
        assert set(held_tokens(out.cache, 0, 0, head)) == {0, 1, 2, 3, *range(96, 140)}
    check_pool(
        out.cache.spec.layout,
        out.cache.stored.page_table,
        out.cache.stored.tier_len,
        out.cache.stored.ring,
    )
