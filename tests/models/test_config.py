"""`config_from_hf` on configs in the style of published checkpoints, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from diffkv_jax.models import ModelConfig, build_model, config_from_hf
from diffkv_jax.models.registry import FAMILIES
from diffkv_jax.models.rope import RopeScaling

LLAMA32_ROPE = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA32 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**LLAMA32_ROPE, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
MISTRAL = {
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN25 = {
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA3_1B = {
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def test_llama32():
    config = config_from_hf(LLAMA32)
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert (config.rope_theta, config.head_dim, config.num_key_value_heads) == (500000.0, 64, 8)
    assert config.tie_word_embeddings and config.sliding_windows == (None,) * 16
    assert hash(config) == hash(config_from_hf(dict(LLAMA32)))


def test_a_size_that_follows_from_others():
    small = {
        k: v
        for k, v in LLAMA32.items()
        if k not in ("head_dim", "num_key_value_heads", "tie_word_embeddings")
    }
    config = config_from_hf(small)
    assert (config.head_dim, config.num_key_value_heads, config.tie_word_embeddings) == (
        64,
        32,
        False,
    )
    assert config_from_hf({**small, "num_key_value_heads": None}) == config


def test_the_two_layouts_of_rope_are_one():
    old = config_from_hf(LLAMA32)
    rest = {k: v for k, v in LLAMA32.items() if k not in ("rope_scaling", "rope_theta")}
    assert (
        config_from_hf(
            {
                **rest,
                "rope_parameters": {**LLAMA32_ROPE, "rope_type": "llama3", "rope_theta": 500000.0},
            }
        )
        == old
    )
    assert (
        config_from_hf(
            {**rest, "rope_theta": 500000.0, "rope_scaling": {**LLAMA32_ROPE, "type": "llama3"}}
        )
        == old
    )
    assert config_from_hf(rest).rope_theta == 10000.0
    linear = config_from_hf({**rest, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert linear.rope_scaling == RopeScaling("linear", 2.0)
    assert (
        config_from_hf(
            {**rest, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
        ).rope_scaling
        is None
    )


def test_llama3_rope_without_an_original_context_takes_the_context():
    block = {
        k: v for k, v in LLAMA32["rope_scaling"].items() if k != "original_max_position_embeddings"
    }
    scaling = config_from_hf({**LLAMA32, "rope_scaling": block}).rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == 131072


def test_mistral_windows():
    assert config_from_hf(MISTRAL).sliding_windows == (4096,) * 32
    assert config_from_hf({**MISTRAL, "sliding_window": None}).sliding_windows == (None,) * 32
    assert (
        config_from_hf({k: v for k, v in MISTRAL.items() if k != "sliding_window"}).sliding_windows
        == (4096,) * 32
    )


@pytest.mark.parametrize("raw", [QWEN25, QWEN3])
def test_qwen_windows(raw):
    layers = raw["num_hidden_layers"]
    assert config_from_hf(raw).sliding_windows == (None,) * layers
    used = {**raw, "use_sliding_window": True, "sliding_window": 99, "max_window_layers": 20}
    assert config_from_hf(used).sliding_windows == (None,) * 20 + (99,) * (layers - 20)
    kinds = ["sliding_attention"] + ["full_attention"] * (layers - 1)
    assert config_from_hf({**used, "layer_types": kinds}).sliding_windows == (99,) + (None,) * (
        layers - 1
    )


def test_qwen_sizes():
    assert config_from_hf(QWEN25).head_dim == 64
    assert config_from_hf(QWEN3).head_dim == 128
    assert config_from_hf({k: v for k, v in QWEN3.items() if k != "head_dim"}).head_dim == 128


def test_gemma3_text():
    config = config_from_hf(GEMMA3_1B)
    assert config.sliding_windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
    assert (config.rope_theta, config.rope_local_base_freq, config.rope_scaling) == (
        1000000,
        10000,
        None,
    )
    assert (config.hidden_act, config.query_pre_attn_scalar, config.tie_word_embeddings) == (
        "gelu_pytorch_tanh",
        256,
        True,
    )
    new = {
        k: v for k, v in GEMMA3_1B.items() if not k.startswith(("rope_", "sliding_window_pattern"))
    }
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
    }
    new["layer_types"] = [
        "full_attention" if window is None else "sliding_attention"
        for window in config.sliding_windows
    ]
    assert config_from_hf(new) == config


def test_gemma3_text_config_inside_a_multimodal_one():
    config = config_from_hf(GEMMA3_4B)
    assert config.model_type == "gemma3_text"
    assert (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
    ) == (8, 4, 256, 262208)
    assert (config.rope_theta, config.rope_local_base_freq) == (1000000.0, 10000.0)
    assert config.rope_scaling == RopeScaling("linear", 8.0)
    assert config.sliding_windows[:7] == (1024,) * 5 + (None, 1024)
    assert config.tie_word_embeddings
    assert not config_from_hf({**GEMMA3_4B, "tie_word_embeddings": False}).tie_word_embeddings
    without_type = {k: v for k, v in GEMMA3_4B["text_config"].items() if k != "model_type"}
    assert config_from_hf({**GEMMA3_4B, "text_config": without_type}) == config


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


_reads: set[str] = set()


class _Watched(ModelConfig):
    """Notes which attributes are asked for."""

    def __getattribute__(self, name: str) -> Any:
        _reads.add(name)
        return super().__getattribute__(name)


def test_every_field_is_read_by_some_model():
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    seen: set[str] = set()
    for family in FAMILIES:
        config = _Watched(
            family, 32, 16, 24, 2, 2, 1, 8, 64, sliding_window=4, rope_local_base_freq=100.0
        )
        _reads.clear()  # what validation reads does not count
        model = build_model(config)
        tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
        jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
        assert model.attention.num_layers == 2 and model.stop_token_ids == ()
        seen |= _reads
    assert fields <= seen, f"never read: {sorted(fields - seen)}"
