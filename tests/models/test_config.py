"""`config_from_hf` on configs in the style of published checkpoints."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from published_configs import GEMMA3_1B, GEMMA3_4B, LLAMA32, LLAMA32_ROPE, MISTRAL, QWEN3, QWEN25

from diffkv_jax.models import ModelConfig, build_model, config_from_hf
from diffkv_jax.models.registry import FAMILIES
from diffkv_jax.models.rope import RopeScaling


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
