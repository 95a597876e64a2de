"""KVQuant in whole models: attention over its pages, sinks, and bad input."""

import dataclasses
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
import pytest
from kvquant_equations import apart, coded_keys, coded_values, coupled, dense, token_levels

import diffkv_jax as dkv
from diffkv_jax.cache.layer import LayerView, layer_heads, layer_layout
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.decode_attention import decode_attention
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import tiny_model

TOKENS = np.random.default_rng(3).integers(0, 97, (2, 90))
POLICIES = {
    "kvquant": dkv.kvquant(3, window=16, flush=8),
    "CQ keys": dkv.CompressionPolicy(
        "CQ keys",
        tiers=("K8v4V4t+o1",),
        schedule=dkv.Schedule(window=16, flush=8),
        transform=dkv.WithoutRope(),
    ),
}
EXACT = dkv.CompressionPolicy(
    "exact",
    tiers=("full",),
    transform=dkv.WithoutRope(),
    schedule=dkv.Schedule(window=16, flush=8),
)
HELD = 90 + 29  # tokens in the cache: the last one generated is not


@lru_cache
def generated(name: str):
    """(calibration, output): after a prompt in three chunks and 30 tokens."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    text = np.random.default_rng(1).integers(0, 97, (4, 128))
    calibration = dkv.calibrate(
        model, params, text, POLICIES[name], samples=400, iterations=10, progress=False
    )
    out = dkv.generate(
        model,
        params,
        TOKENS,
        policy=POLICIES[name],
        max_new_tokens=30,
        prefill_chunk=32,
        calibration=calibration,
    )
    return calibration, out


def exact_cache(out: dkv.GenerateOutput) -> dkv.KVCache:
    """The same tokens' keys without their rotary embedding and values, neither coded."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    seen = np.concatenate([TOKENS, out.tokens[:, :-1]], axis=1)
    return dkv.generate(model, params, seen, policy=EXACT, max_new_tokens=1).cache


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_attention_is_that_over_coded_tokens(name):
    """In layer 0 keys and values depend on the tokens alone: those of an exact cache, coded by the
    equations, are what attention reads.
    """
    calibration, out = generated(name)
    cache, scale = out.cache, out.cache.spec.attention.sm_scale
    plain = exact_cache(out)
    q = np.random.default_rng(5).normal(size=(4, 2, 32)).astype(np.float32)
    view = LayerView(cache.spec, jnp.int32(0))
    heads = layer_heads(cache, view, cache.counters.recent_len)
    layout = layer_layout(cache, view)
    found, _, _ = decode_attention(
        jnp.asarray(q),
        cache.stored.pages,
        layout,
        heads,
        max_len=cache.spec.max_len,
        sm_scale=scale,
    )
    for row in range(4):
        request, head = divmod(row, 2)
        held = held_tokens(plain, 0, request, head)
        recent = int(cache.counters.recent_len[request])
        stored = HELD - recent
        k, v = (np.stack([held[t][part] for t in range(stored)]) for part in (1, 2))
        window = [
            np.asarray(x)[0, request, head, :recent] for x in (cache.recent.k, cache.recent.v)
        ]
        key_table, levels = (np.asarray(x[0, head], np.float32) for x in calibration.tables[0])

        if name == "CQ keys":
            keys = apart(k, k, lambda rest, table=key_table: coupled(rest, table), fill=np.mean)
        else:
            keys = coded_keys(k, key_table)
        values = coded_values(v, levels)
        errors = [
            np.abs(found[row] - dense(q[row], coded_k, coded_v, *window, scale)).max()
            for coded_k, coded_v in (
                (keys, values),
                (k, values),
                (keys, v),
                (keys, token_levels(v, levels)),
            )
        ]
        assert errors[0] < 0.25 * min(errors[1:]), errors


@pytest.mark.slow
def test_sinks_stay_exact():
    """With `sinks` there is a tier for them alone; the others are coded as they leave it. The
    calibration does not look at sinks.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policy = dkv.kvquant(3, sinks=2, window=16, flush=8)
    text = np.random.default_rng(1).integers(0, 97, (2, 60))
    calibration = dkv.calibrate(
        model, params, text, policy, samples=120, iterations=3, progress=False
    )
    out = dkv.generate(
        model,
        params,
        TOKENS,
        policy=policy,
        max_new_tokens=30,
        prefill_chunk=32,
        calibration=calibration,
    )
    cache, stored = out.cache, HELD - np.asarray(out.cache.counters.recent_len)
    np.testing.assert_array_equal(cache.stored.tier_len[..., 0], np.full((2, 2, 2), 2))
    np.testing.assert_array_equal(
        cache.stored.tier_len[..., 1], np.broadcast_to(stored[None, :, None] - 2, (2, 2, 2))
    )
    ids = np.asarray(cache.stored.page_table)[..., 0]  # the first page of each head's high tier
    np.testing.assert_array_equal(
        np.sort(np.asarray(cache.stored.pages.position)[ids][..., 0, :2]),
        np.broadcast_to([0, 1], (2, 2, 2, 2)),
    )
    plain = exact_cache(out)
    for request, head in np.ndindex(2, 2):
        held, alike = held_tokens(cache, 0, request, head), held_tokens(plain, 0, request, head)
        key_table, levels = (np.asarray(x[0, head], np.float32) for x in calibration.tables[1])
        assert [held[at][0] for at in (0, 1, 2)] == ["high", "high", "low"]
        for part, code in (
            (1, lambda x, table=key_table: coded_keys(x, table)),
            (2, lambda x, levels=levels: coded_values(x, levels)),
        ):
            found, bare = (
                np.stack([tokens[at][part] for at in range(stored[request])])
                for tokens in (held, alike)
            )
            np.testing.assert_allclose(found[:2], bare[:2], atol=1e-5)
            # a number between two levels may go to either
            off = np.abs(found - code(bare))[2:] > 1e-3
            assert off.mean() < 0.01 < 0.5 < (np.abs(found - bare)[2:] > 1e-3).mean()
    with_sinks = dkv.calibrate(
        model,
        params,
        text,
        dataclasses.replace(policy, protect=dkv.Protect()),
        samples=120,
        iterations=3,
        progress=False,
    )
    assert (with_sinks.tables[1][1] != calibration.tables[1][1]).any()


def test_json_and_bad_input():
    policy = POLICIES["kvquant"]
    assert dkv.CompressionPolicy.from_json(policy.to_json()) == policy and policy.tiers == (
        "K3sV3t+o1",
    )
    assert dkv.kvquant(2, 0).tiers == ("K2sV2t",)
    with pytest.raises(ValueError, match="bits=5"):
        dkv.kvquant(5)
    with pytest.raises(ValueError, match="takes no number"):
        KVFormat.parse("K3s4V3t")
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    with pytest.raises(ValueError, match="calibrate"):
        dkv.generate(model, params, TOKENS, policy=policy, max_new_tokens=1)
