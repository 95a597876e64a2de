"""The decoder stack's contract: parameter tree, padding, cache hand-over, dtypes, and a program
that does not grow with depth.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.model import AttentionSpec, CausalLM
from diffkv_jax.models import ModelConfig, build_model, param_shapes
from diffkv_jax.models.plain_attention import NO_WINDOW, plain_attention
from diffkv_jax.models.registry import FAMILIES

LENGTH = 9


def _config(model_type: str = "gemma3_text", **changes: Any) -> ModelConfig:
    config = ModelConfig(
        model_type=model_type,
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rope_local_base_freq=100.0,
        sliding_window=4,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        attn_logit_softcapping=3.0,
    )
    return dataclasses.replace(config, **changes)


def _inputs(key: jax.Array, model: Any, batch: int = 2) -> tuple[Any, jax.Array, jax.Array]:
    """Parameters without zeros, tokens and positions [batch, LENGTH]."""
    tokens = jax.random.randint(key, (batch, LENGTH), 0, 50)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    draw = np.random.default_rng(1).standard_normal
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * draw(leaf.shape), leaf.dtype), param_shapes(model)
    )
    return params, tokens, positions


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_have_hugging_face_names_stacked_and_transposed(family):
    shapes = param_shapes(build_model(_config(family), param_dtype="bfloat16"))
    layers, attention = shapes["layers"], shapes["layers"]["self_attn"]
    assert shapes["embed_tokens"]["embedding"] == jax.ShapeDtypeStruct((50, 16), jnp.bfloat16)
    assert shapes["lm_head"]["kernel"].shape == (16, 50)
    assert shapes["norm"]["weight"].shape == (16,)
    assert layers["input_layernorm"]["weight"].shape == (3, 16)
    assert layers["mlp"]["down_proj"]["kernel"].shape == (3, 24, 16)
    assert attention["q_proj"]["kernel"].shape == (3, 16, 32)
    assert attention["k_proj"]["kernel"].shape == (3, 16, 16)
    assert attention["o_proj"]["kernel"].shape == (3, 32, 16)
    assert ("bias" in attention["q_proj"]) == (family == "qwen2")
    assert "bias" not in attention["o_proj"]
    assert ("q_norm" in attention) == (family in ("qwen3", "gemma3_text"))
    assert ("pre_feedforward_layernorm" in layers) == (family == "gemma3_text")
    assert "lm_head" not in param_shapes(build_model(_config(family, tie_word_embeddings=True)))


def test_the_model_is_a_causal_lm_and_states_its_attention():
    model = build_model(_config(query_pre_attn_scalar=4.0), dtype=jnp.bfloat16)
    assert isinstance(model, CausalLM)
    rope = model.attention.rope
    assert model.attention == AttentionSpec(
        3, 4, 2, 8, (4, None, 4), 0.5, 3.0, 50, 64, "bfloat16", rope
    )
    np.testing.assert_allclose(rope, 10000.0 ** -np.array([0, 0.25, 0.5, 0.75]), rtol=1e-6)
    assert hash(model.attention) == hash(model.clone().attention)
    assert hash(model) == hash(build_model(_config(query_pre_attn_scalar=4.0), dtype="bfloat16"))


def test_an_attention_spec_that_does_not_add_up_is_refused():
    with pytest.raises(
        ValueError, match="sliding_windows=.* must hold one entry for each of num_layers=2"
    ):
        AttentionSpec(2, 4, 2, 8, (None,), 1.0, None, 50, 64, "float32")
    with pytest.raises(ValueError, match="num_q_heads=3 must be a multiple of num_kv_heads=2"):
        AttentionSpec(1, 3, 2, 8, (None,), 1.0, None, 50, 64, "float32")


def test_tokens_and_positions_must_agree(key):
    model = build_model(_config())
    params, tokens, positions = _inputs(key, model)
    with pytest.raises(
        ValueError,
        match=r"tokens of shape \(2, 9\) and positions of shape \(2, "
        r"8\)",
    ):
        model.apply({"params": params}, tokens, positions[:, 1:])
    with pytest.raises(ValueError, match=r"must both be \[batch, length\]"):
        model.apply({"params": params}, tokens[0], positions[0])


@pytest.mark.slow
def test_last_only_is_the_last_row(key):
    model = build_model(_config(final_logit_softcapping=5.0))
    params, tokens, positions = _inputs(key, model)
    logits, cache = model.apply({"params": params}, tokens, positions)
    last, _ = model.apply({"params": params}, tokens, positions, last_only=True)
    assert cache is None and last.shape == (2, 1, 50)
    np.testing.assert_allclose(last, logits[:, -1:], atol=1e-6)
    assert float(jnp.abs(logits).max()) <= 5.0


def test_padding_changes_nothing_and_is_finite(key):
    model = build_model(_config())
    params, tokens, positions = _inputs(key, model)
    wanted, _ = model.apply({"params": params}, tokens, positions)
    pad = ((0, 0), (3, 0))
    padded, _ = model.apply(
        {"params": params},
        jnp.pad(tokens, pad, constant_values=10**6),
        jnp.pad(positions, pad, constant_values=-1),
    )
    assert bool(jnp.isfinite(padded).all())
    np.testing.assert_allclose(padded[:, 3:], wanted, atol=1e-5)


def test_a_token_outside_the_vocabulary_is_loud(key):
    model = build_model(_config())
    params, tokens, positions = _inputs(key, model)
    logits, _ = model.apply({"params": params}, tokens.at[0, 4].set(50), positions)
    assert bool(jnp.isnan(logits[0, 4:]).all()) and bool(jnp.isfinite(logits[1]).all())


def test_bfloat16_stays_near_float32(key):
    exact, coarse = (
        build_model(_config()),
        build_model(_config(), dtype="bfloat16", param_dtype="bfloat16"),
    )
    params, tokens, positions = _inputs(key, coarse)
    wanted, _ = exact.apply(
        {"params": jax.tree.map(lambda x: x.astype(jnp.float32), params)}, tokens, positions
    )
    got, _ = coarse.apply({"params": params}, tokens, positions)
    assert got.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(got - wanted).max() / jnp.ptp(wanted)) < 0.1


def _dense_attend(model: Any) -> Any:
    """A stand-in for `diffkv_jax.steps.attend`: a dense cache k, v [layers, B, capacity, K, H],
    written at its own `used`.
    """
    spec = model.attention
    windows = jnp.asarray([NO_WINDOW if w is None else w for w in spec.sliding_windows])

    def attend(
        cache: Any,
        layer: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        step: Any,
    ) -> Any:
        assert layer.dtype == jnp.int32 and layer.shape == ()
        start = (layer, 0, step["used"], 0, 0)
        cache = {
            "k": jax.lax.dynamic_update_slice(cache["k"], k[None], start),
            "v": jax.lax.dynamic_update_slice(cache["v"], v[None], start),
            "positions": jax.lax.dynamic_update_slice(
                cache["positions"], step["positions"], (0, step["used"])
            ),
        }
        full_q = jax.lax.dynamic_update_slice(
            jnp.zeros((*cache["k"].shape[1:3], *q.shape[2:])), q, (0, step["used"], 0, 0)
        )
        out = plain_attention(
            full_q,
            cache["k"][layer],
            cache["v"][layer],
            cache["positions"],
            windows[layer],
            sm_scale=spec.sm_scale,
            logits_soft_cap=spec.logits_soft_cap,
        )
        return jax.lax.dynamic_slice_in_dim(out, step["used"], q.shape[1], axis=1), cache

    return attend


def test_a_cache_goes_through_all_layers_and_comes_back(key, monkeypatch):
    model = build_model(_config())
    params, tokens, positions = _inputs(key, model)
    wanted, _ = model.apply({"params": params}, tokens, positions)
    monkeypatch.setattr("diffkv_jax.models.self_attention.attend", _dense_attend(model))
    empty = jnp.zeros((3, 2, LENGTH, 2, 8))
    cache: Any = {"k": empty, "v": empty, "positions": jnp.full((2, LENGTH), -1)}
    run = jax.jit(lambda *given: model.apply({"params": params}, *given))
    got = []
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        step = {"used": jnp.int32(begin), "positions": positions[:, begin:end]}
        logits, cache = run(tokens[:, begin:end], positions[:, begin:end], cache, step)
        got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), wanted, atol=1e-5)


def _program_size(num_layers: int) -> int:
    model = build_model(_config(num_hidden_layers=num_layers, layer_types=None))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    traced = jax.jit(model.apply).lower({"params": param_shapes(model)}, tokens, tokens)
    return len(traced.as_text().splitlines())


def test_the_program_does_not_grow_with_depth():
    assert _program_size(12) == _program_size(3)


def _by_hand(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    window: int,
    cap: float | None,
) -> np.ndarray:
    """Attention one query at a time, float64."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(*q.shape[:3]):
        place = positions[b, t]
        seen = [
            s
            for s in range(q.shape[1])
            if 0 <= positions[b, s] <= place and place - positions[b, s] < window
        ]
        if not seen:
            continue
        scores = np.array([q[b, t, n] @ k[b, s, n // 2] for s in seen], np.float64) * 0.3
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = (weights / weights.sum()) @ np.stack([v[b, s, n // 2] for s in seen])
    return out


@pytest.mark.parametrize("window", [1, 3, NO_WINDOW])
@pytest.mark.parametrize("cap", [None, 0.7])
def test_plain_attention_by_hand(window, cap):
    draw = np.random.default_rng(0).standard_normal
    q, k, v = (draw((2, 6, heads, 5), np.float32) for heads in (4, 2, 2))
    positions = np.array([[-1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]], np.int32)
    given = jnp.asarray(positions), jnp.int32(window)
    got = plain_attention(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), *given, sm_scale=0.3, logits_soft_cap=cap
    )
    np.testing.assert_allclose(got, _by_hand(q, k, v, positions, window, cap), atol=2e-6)
    other = _by_hand(q, k, v, positions, window + 1 if window != NO_WINDOW else 3, cap)
    assert np.abs(got - other).max() > 1e-3  # the check can fail
