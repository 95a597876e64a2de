"""Tiny seeded models for tests of the cache: sharp enough that attention is not uniform."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from diffkv_jax.models import ModelConfig, build_model, config_from_hf


@lru_cache
def tiny_model(
    *,
    q_heads=3,
    kv_heads=1,
    head_dim=64,
    layers=2,
    vocab=97,
    windows=None,
    sharpness=4.0,
    seed=0,
    max_len=4096,
    model_type="llama",
):
    """(model, params): a llama-like model in float32; `windows` per layer (None = global) makes a
    sliding-window one.
    """
    config = ModelConfig(
        model_type=model_type if windows is None else "mistral",
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=q_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_len,
        tie_word_embeddings=False,
        sliding_window=next((w for w in windows if w), None) if windows else None,
        layer_types=tuple("sliding_attention" if w else "full_attention" for w in windows)
        if windows
        else None,
    )
    model = build_model(config, "float32")
    one = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), one, one)["params"]
    attention = params["layers"]["self_attn"]
    # peaked attention, so that thresholds have something to tell apart
    for name in ("q_proj", "k_proj"):
        attention[name]["kernel"] = attention[name]["kernel"] * sharpness**0.5
    return model, params


@lru_cache
def tiny_latent_model(*, layers=2, sharpness=4.0, seed=0, **changes):
    """(model, params): a DeepSeek-like model in float32, latents of 64 channels and a rotary part
    of 16; no experts as it comes.
    """
    raw = dict(
        model_type="deepseek_v2",
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=4,
        max_position_embeddings=4096,
        kv_lora_rank=64,
        qk_nope_head_dim=20,
        qk_rope_head_dim=16,
        v_head_dim=12,
        q_lora_rank=None,
        num_experts_per_tok=2,
    )
    model = build_model(config_from_hf(raw | changes), "float32")
    one = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(seed), one, one)["params"]
    for stack in params.values():
        if "self_attn" in stack:
            attention = stack["self_attn"]
            query = attention["q_proj" if "q_proj" in attention else "q_b_proj"]
            query["kernel"] = query["kernel"] * sharpness
            norm = attention["kv_a_layernorm"]
            norm["weight"] = norm["weight"] * (
                1 + 0.3 * jax.random.normal(jax.random.key(seed), norm["weight"].shape)
            )
    return model, params


def prompt(length: int, seed: int = 0, vocab: int = 97) -> np.ndarray:
    """Random token ids int32 [length]."""
    return np.random.default_rng(seed).integers(0, vocab, length).astype(np.int32)
