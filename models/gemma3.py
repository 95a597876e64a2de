"""Gemma 3's text part: local and global layers, two rope bases, more norms (arXiv:2503.19786)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .config import ModelConfig
from .family import Family, InGGUF, sizes
from .gguf_keys import number, size
from .switches import Switches

if TYPE_CHECKING:
    from .gguf_file import GGUFFile  # needs the gguf package


def _layers(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, tuple[str, ...] | None]:
    """The list of kinds, or the older "every n-th layer is global" (checkpoints have either)."""
    window = raw.get("sliding_window", 4096)
    if raw.get("layer_types") is not None:
        return window, tuple(raw["layer_types"])
    every = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
    return window, tuple(
        "sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers)
    )


def _switches(config: ModelConfig) -> Switches:
    return Switches(
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        qk_norm=True,
        sandwich_norms=True,
        norm_adds_one=True,
        scale_embeddings=True,
    )


_LAYERS_PER_GLOBAL_LAYER = 6
# the one size whose attention scale is not 1/sqrt(head_dim); a GGUF file does not state it
_LAYERS_OF_27B = 62
_GGUF_KEYS = (
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "rope.freq_base_swa",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)
_GGUF_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _gguf(file: "GGUFFile", config: Mapping[str, Any]) -> dict[str, Any]:
    """The file states the window, the rest are the family's own."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    period = file.metadata.get("gemma3.attention.sliding_window_pattern", _LAYERS_PER_GLOBAL_LAYER)
    if type(period) is not int or period < 1:
        raise ValueError(
            f"{file.path}: gemma3.attention.sliding_window_pattern must be one integer, given "
            f"{period}: convert the model again"
        )
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": size(file, "gemma3.attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)
        ],
        "rope_theta": number(file, "gemma3.rope.freq_base", 1000000.0),
        "rope_local_base_freq": number(file, "gemma3.rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": config["hidden_size"] // heads
        if layers == _LAYERS_OF_27B
        else config["head_dim"],
        "attention_bias": False,
        "attn_logit_softcapping": number(file, "gemma3.attn_logit_softcapping", None) or None,
        "final_logit_softcapping": number(file, "gemma3.final_logit_softcapping", None) or None,
    }


GEMMA3 = Family(
    model_type="gemma3_text",
    hf_fields=sizes(
        vocab_size=262208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
        attention_bias=False,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    ),
    rope_theta=1000000.0,
    layers=_layers,
    switches=_switches,
    rope_local_base_freq=10000.0,
    reads=("sliding_window", "sliding_window_pattern"),
    must_be_off=("use_bidirectional_attention",),
    in_gguf=InGGUF(
        "gemma3",
        "Gemma3ForCausalLM",
        _gguf,
        reads=_GGUF_KEYS,
        names=_GGUF_NAMES,
        norms_plus_one=True,
    ),
    text_of="gemma3",
)
