"""What `config_from_hf` and `build_model` refuse, in configs like published ones."""

import dataclasses
from typing import Any

import pytest
from published_configs import GEMMA3_1B, LLAMA32, MISTRAL, QWEN3

from diffkv_jax.models import build_model, config_from_hf


def _longrope(factor: float = 4.0) -> dict[str, Any]:
    return {"rope_type": "longrope", "factor": factor}


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        LLAMA32,
        {"model_type": "falcon"},
        r"model_type='falcon' is not supported; supported are .*llama, mistral, qwen2, .*gemma3",
    ),
    (LLAMA32, {"model_type": None}, r"must name its model_type"),
    (LLAMA32, {"hidden_size": None}, r"lacks hidden_size"),
    (
        LLAMA32,
        {"rope_scaling": _longrope()},
        r"rope_type='longrope' is not supported; supported "
        r"are default, linear, llama3, yarn",
    ),
    (
        LLAMA32,
        {"rope_scaling": None, "rope_parameters": _longrope()},
        r"rope_type='longrope' is "
        r"not supported",
    ),
    (LLAMA32, {"rope_scaling": {"rope_type": "yarn"}}, r"rope_type='yarn' needs factor"),
    (
        LLAMA32,
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 40}},
        r"beta_slow=40.0 must be positive and below",
    ),
    (
        LLAMA32,
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        r"truncate=False is not supported",
    ),
    (
        LLAMA32,
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        r"rope_type='dynamic' is not "
        r"supported",
    ),
    (
        LLAMA32,
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        r"needs low_freq_factor, "
        r"high_freq_factor",
    ),
    (LLAMA32, {"rope_scaling": {"rope_type": "linear"}}, r"rope_type='linear' needs factor"),
    (
        LLAMA32,
        {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        r"rope factor=0.5 must be "
        r"at least 1",
    ),
    (
        LLAMA32,
        {"rope_scaling": {**LLAMA32["rope_scaling"], "low_freq_factor": 4.0}},
        r"low_freq_factor=4.0 must be positive and below",
    ),
    (
        LLAMA32,
        {"rope_scaling": {**LLAMA32["rope_scaling"], "original_max_position_embeddings": -1}},
        r"embeddings=-1 must be at least 1",
    ),
    (
        LLAMA32,
        {"rope_parameters": {"full_attention": {}}},
        r"rope_parameters has blocks "
        r"\['full_attention'\]",
    ),
    (LLAMA32, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not supported"),
    (LLAMA32, {"head_dim": 63}, r"head_dim=63 must be even"),
    (
        LLAMA32,
        {"head_dim": None, "hidden_size": 2050},
        r"hidden_size=2050 must be a multiple of "
        r"num_attention_heads=32",
    ),
    (
        LLAMA32,
        {"num_key_value_heads": 5},
        r"num_attention_heads=32 must be a multiple of "
        r"num_key_value_heads=5",
    ),
    (LLAMA32, {"num_hidden_layers": 0}, r"num_hidden_layers=0 must be an integer of at least 1"),
    (LLAMA32, {"num_hidden_layers": "16"}, r"num_hidden_layers='16' must be an integer"),
    (LLAMA32, {"vocab_size": "big"}, r"vocab_size='big' must be an integer"),
    (LLAMA32, {"rms_norm_eps": 0.0}, r"rms_norm_eps=0.0 must be a finite number above 0"),
    (LLAMA32, {"rope_theta": float("nan")}, r"rope_theta=nan must be a finite number"),
    (
        LLAMA32,
        {"hidden_act": "relu"},
        r"hidden_act='relu' is not supported; supported are silu, "
        r"gelu",
    ),
    (MISTRAL, {"sliding_window": -1}, r"sliding_window=-1 must be an integer of at least 1"),
    (
        MISTRAL,
        {"layer_types": ["full_attention"] * 32},
        r"does not fit model_type='mistral', "
        r"whose layers are all alike",
    ),
    (
        QWEN3,
        {"layer_types": ["full_attention"] * 3},
        r"layer_types has 3 entries and must have "
        r"one for each of num_hidden_layers=28",
    ),
    (
        QWEN3,
        {"layer_types": ["chunked_attention"] * 28},
        r"layer_types entry 'chunked_attention' "
        r"is not supported",
    ),
    (
        QWEN3,
        {"layer_types": ["sliding_attention"] * 28},
        r"sliding_window=None must be a number "
        r"of tokens",
    ),
    (
        GEMMA3_1B,
        {"use_bidirectional_attention": True},
        r"use_bidirectional_attention=True is not "
        r"supported",
    ),
    (
        GEMMA3_1B,
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        r"of the sliding_attention layers",
    ),
    (
        GEMMA3_1B,
        {"final_logit_softcapping": -30.0},
        r"final_logit_softcapping=-30.0 must be a "
        r"finite number above 0",
    ),
]


@pytest.mark.parametrize(("raw", "change", "message"), BAD)
def test_what_cannot_be_right_is_refused(raw, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**raw, **change})


def test_an_unknown_family_or_dtype_is_refused_by_build_model():
    config = config_from_hf(LLAMA32)
    with pytest.raises(ValueError, match="model_type='falcon' is not supported"):
        build_model(dataclasses.replace(config, model_type="falcon"))
    with pytest.raises(ValueError, match="dtype=int8 is not supported"):
        build_model(config, dtype="int8")
    with pytest.raises(ValueError, match="param_dtype=float64 is not supported"):
        build_model(config, param_dtype="float64")
