"""Keys of config.json that change the computation are read or refused by name; what published files
have beside them passes.
"""

from typing import Any

import pytest

from diffkv_jax.models import config_from_hf
from diffkv_jax.models.rope import RopeScaling
from helpers_model import FAMILIES, tiny_config

SIZES = dict(
    kv_lora_rank=24,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    q_lora_rank=None,
    num_key_value_heads=4,
)
EXPERTS = dict(
    moe_intermediate_size=20,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=2,
    topk_group=1,
    n_shared_experts=1,
)


def raw_of(family: str) -> dict[str, Any]:
    if family.startswith("deepseek"):
        return (
            {key: value for key, value in tiny_config("llama").items() if key != "head_dim"}
            | SIZES
            | EXPERTS
            | {"model_type": family}
        )
    return tiny_config(family)


CHANGING: list[tuple[str, Any]] = [
    ("logit_scale", 0.0625),
    ("logits_scaling", 8.0),
    ("residual_multiplier", 0.22),
    ("residual_multiplier", 0.0),
    ("embedding_multiplier", 12.0),
    ("attention_multiplier", 0.015625),
    ("attention_multiplier", 1.0),
    ("softmax_scale", 1.0),
    ("clip_qkv", 8.0),
    ("qk_layernorm", True),
    ("use_qk_norm", True),
    ("rope_interleaved", True),
    ("no_rope_layers", [1, 0]),
    ("attention_chunk_size", 8192),
    ("attn_temperature_tuning", True),
    ("scale_emb", 12),
    ("scale_depth", 1.4),
    ("alibi", True),
    ("parallel_attn", True),
    ("rotary_pct", 0.25),
    ("rotary_dim", 8),
    ("use_dynamic_ntk", True),
    ("use_logn_attn", True),
    ("attention_sink_size", 4),
    ("is_causal", False),
    ("num_local_experts", 8),
    ("norm_type", "layernorm"),
    ("a_new_attention_thing", 3),
    ("new_rope_thing", {"x": 1}),
]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "deepseek_v3"])
@pytest.mark.parametrize(("key", "value"), CHANGING)
def test_unread_keys_that_change_the_computation(family: str, key: str, value: Any) -> None:
    raw = raw_of(family)
    config_from_hf(raw)
    with pytest.raises(ValueError) as error:
        config_from_hf(raw | {key: value})
    assert f"{key}={value!r}" in str(error.value) and f"model_type={family!r}" in str(error.value)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "query_pre_attn_scalar", 24),
        ("llama", "use_sliding_window", True),
        ("llama", "sliding_window", 8),
        ("llama", "max_window_layers", 1),
        ("llama", "rope_interleave", True),
        ("llama", "rope_local_base_freq", 100.0),
        ("llama", "partial_rotary_factor", 0.5),
        ("mistral", "attention_bias", True),
        ("mistral", "mlp_bias", True),
        ("mistral", "use_sliding_window", True),
        ("qwen2", "query_pre_attn_scalar", 24),
        ("qwen2", "mlp_bias", True),
        ("qwen3", "attn_logit_softcapping", 50.0),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("gemma3_text", "max_window_layers", 3),
        ("deepseek_v2", "rope_interleave", False),
        ("deepseek_v2", "scoring_func", "sigmoid"),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "topk_method", "greedy"),
        ("deepseek_v3", "query_pre_attn_scalar", 24),
    ],
)
def test_keys_that_another_family_reads(family: str, key: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"{key}={value}" if not isinstance(value, str) else f"{key}='{value}'"
    ):
        config_from_hf(raw_of(family) | {key: value})


PUBLISHED: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "x",
    "architectures": ["X"],
    "attention_dropout": 0.1,
    "attn_implementation": "sdpa",
    "auto_map": {"AutoConfig": "x"},
    "aux_loss_alpha": 0.001,
    "cache_implementation": "hybrid",
    "chunk_size_feed_forward": 0,
    "ep_size": 1,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "is_llama_config": True,
    "num_nextn_predict_layers": 1,
    "output_attentions": False,
    "output_router_logits": False,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "router_aux_loss_coef": 0.001,
    "seq_aux": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.40",
    "unsloth_fixed": True,
    "use_cache": True,
    # off
    "attn_logit_softcapping": None,
    "clip_qkv": None,
    "logit_scale": 1.0,
    "residual_multiplier": 1,
    "num_experts": 0,
    "use_qk_norm": False,
    "partial_rotary_factor": 1.0,
    "is_causal": True,
}


@pytest.mark.parametrize("family", [*FAMILIES, "deepseek_v2", "deepseek_v3"])
def test_what_published_files_have(family: str) -> None:
    raw = raw_of(family)
    assert config_from_hf(PUBLISHED | raw) == config_from_hf(raw)


@pytest.mark.parametrize(
    "family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text", "DeepseekV2", "DeepseekV3"]
)
def test_what_transformers_writes(family: str) -> None:
    """Every key of its own configs is known, also those that save_pretrained leaves out."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    changes = {"num_experts_per_tok": 6} if family == "DeepseekV2" else {}
    config_from_hf(getattr(transformers, f"{family}Config")(**changes).to_dict())


ROPE_REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"rope_type": "linear", "factor": 2.0, "beta_fast": 8},
        "beta_fast=8, which rope_type='linear' does not have",
    ),
    (
        {"rope_type": "yarn", "factor": 2.0, "low_freq_factor": 1.0},
        "low_freq_factor=1.0, which rope_type='yarn'",
    ),
    ({"rope_type": "yarn", "factor": 2.0, "extrapolation_factor": 0.5}, "extrapolation_factor=0.5"),
    (
        {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "mscale": 1,
        },
        "mscale=1, which",
    ),
    (
        {"rope_type": "default", "factor": 2.0},
        "factor=2.0, which rope_type='default' does not have",
    ),
    ({"factor": 2.0}, "factor=2.0, which rope_type='default' does not have"),
    ({"rope_type": "default", "mrope_section": [4, 2, 2]}, "mrope_section="),
    ({"rope_type": "linear", "factor": 2.0, "brand_new": "x"}, "brand_new='x'"),
    (
        {"rope_type": "yarn", "type": "linear", "factor": 2.0},
        "rope_type='yarn' and type='linear' must agree",
    ),
]


@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("block", "message"), ROPE_REFUSED)
def test_rope_blocks_with_unknown_keys(layout: str, block: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        config_from_hf(tiny_config("llama") | {layout: block})


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_unknown_keys_of_gemmas_blocks(kind: str) -> None:
    with pytest.raises(ValueError, match="factor=2.0, which rope_type='default'"):
        config_from_hf(
            tiny_config("gemma3_text")
            | {"rope_parameters": {kind: {"rope_type": "default", "factor": 2.0}}}
        )
    with pytest.raises(ValueError, match="has .'rope_theta'. beside its blocks"):
        config_from_hf(
            tiny_config("gemma3_text") | {"rope_parameters": {kind: {}, "rope_theta": 5.0}}
        )


def test_two_rope_layouts_that_differ() -> None:
    one, two = {"rope_type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 4.0}
    same = config_from_hf(tiny_config("llama") | {"rope_scaling": one, "rope_parameters": one})
    assert same.rope_scaling == RopeScaling("linear", 2.0)
    with pytest.raises(ValueError, match="rope_scaling and rope_parameters differ in .'factor'."):
        config_from_hf(tiny_config("llama") | {"rope_scaling": one, "rope_parameters": two})
    with pytest.raises(ValueError, match="rope_scaling=2.0 must be an object or null"):
        config_from_hf(tiny_config("llama") | {"rope_scaling": 2.0})


def test_keys_that_the_rope_types_share() -> None:
    yarn = {
        "type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 8192,
        "finetuned": True,
    }
    scaling = config_from_hf(tiny_config("llama") | {"rope_scaling": yarn}).rope_scaling
    assert scaling is not None and (scaling.factor, scaling.original_max_position_embeddings) == (
        16.0,
        8192,
    )


def test_an_original_context_outside_the_block_wins() -> None:
    """As transformers has it for Phi-3 and all who write it there."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    raw = tiny_config("llama") | {"rope_scaling": yarn, "original_max_position_embeddings": 64}
    scaling = config_from_hf(raw).rope_scaling
    assert scaling is not None and scaling.original_max_position_embeddings == 64
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(
        **{key: value for key, value in raw.items() if key != "model_type"}
    )
    theirs.standardize_rope_params()  # what computing the frequencies starts with
    assert theirs.rope_parameters["original_max_position_embeddings"] == 64


@pytest.mark.parametrize("key", ["rope_theta", "rope_local_base_freq"])
def test_a_base_of_zero_is_no_default(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=0.0 must be a finite number above 0"):
        config_from_hf(tiny_config("gemma3_text") | {key: 0})


def test_two_activations_that_differ() -> None:
    raw = tiny_config("gemma3_text")
    assert (
        config_from_hf(raw | {"hidden_activation": "gelu", "hidden_act": "gelu"}).hidden_act
        == "gelu"
    )
    for first, second in (("gelu", "silu"), ("silu", "gelu")):
        with pytest.raises(
            ValueError, match=f"hidden_act='{first}' and hidden_activation='{second}' must agree"
        ):
            config_from_hf(raw | {"hidden_act": first, "hidden_activation": second})
