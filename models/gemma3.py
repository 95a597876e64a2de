"""Gemma 3's text part: local and global layers, two rope bases, more norms (arXiv:2503.19786)."""

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .family import Family, sizes
from .switches import Switches


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


GEMMA3 = Family(
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
)
