"""Keys of config.json that no family reads but that change the computation: refused by name."""

import re
from collections.abc import Mapping
from typing import Any

from .family import Family

_ROPE_KEYS = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "layer_types",
)
"""Read, or checked, for every family."""

_COMPUTES = frozenset(
    "act activation alibi attend attention attn bidirectional bias causal chunk clip cross depth "
    "emb embedding embeddings expert experts factor ffn gate gated head heads interleave "
    "interleaved kv layer layernorm layers logit logits logn lora mla mlp moe mtp multiplier mup "
    "norm ntk nope parallel position positional positions qk qkv query ratio residual rms rope "
    "rotary router scale scales scaling scalar scoring shared sink sinks softcap softcapping "
    "softmax sparse sparsity ssm swiglu topk value window windows yarn".split()
)
"""A key with one of these words between its underscores speaks of the network itself."""

_HARMLESS = {
    "attention_dropout": "training",
    "attention_probs_dropout_prob": "training",
    "attn_pdrop": "training",
    "embd_pdrop": "training",
    "resid_pdrop": "training",
    "layerdrop": "training",
    "router_aux_loss_coef": "training",
    "router_jitter_noise": "training",
    "router_z_loss_coef": "training",
    "add_cross_attention": "off in every decoder-only model",
    "cross_attention_hidden_size": "of a cross attention that add_cross_attention turns off",
    "attn_implementation": "which kernel computes the same attention",
    "flash_attn": "which kernel computes the same attention",
    "use_flash_attn": "which kernel computes the same attention",
    "use_flash_attention": "which kernel computes the same attention",
    "use_flash_attention_2": "which kernel computes the same attention",
    "use_sdpa_attention": "which kernel computes the same attention",
    "chunk_size_feed_forward": "how many rows the MLP computes at a time",
    "layer_norm_eps": "of LayerNorm; these families have RMSNorm, whose rms_norm_eps is read",
    "layer_norm_epsilon": "of LayerNorm; these families have RMSNorm, whose rms_norm_eps is read",
    "norm_eps": "another name of rms_norm_eps, which is read",
    "num_logits_to_keep": "which logits are returned",
    "output_attentions": "what else is returned",
    "output_router_logits": "what else is returned",
    "num_mtp_layers": "layers behind the model's last; their tensors, where present, are refused "
    "by name",
    "num_nextn_predict_layers": "layers behind the model's last; their tensors, where present, "
    "are refused by name",
    "qk_head_dim": "the sum of qk_nope_head_dim and qk_rope_head_dim, which are read",
}
"""Keys with such a word that change no logits, and why."""

_FACTORS = re.compile(r"(^|_)(multiplier|scale|scales|scaling|factor|ratio)(_|$)")


def check_keys(raw: Mapping[str, Any], family: Family) -> None:
    """Raise ValueError, with names and values, for unread keys that change the computation.

    Values that turn such a key off pass: null, false, 0, an empty list, and 1 for a plain factor.
    """
    read = {*family.hf_fields, *family.reads, *family.must_be_off, *_ROPE_KEYS, *_renamed(family)}
    unread = {
        key: value
        for key, value in raw.items()
        if key not in read and _computes(key) and not _is_off(key, value)
    }
    if unread:
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(unread.items()))
        raise ValueError(
            f"config.json has {listed}, which would change the computation and is not supported "
            f"for model_type={raw['model_type']!r}; use a checkpoint without it (remove a key only "
            "if the model ignores it)."
        )


def _renamed(family: Family) -> tuple[str, ...]:
    second_base = ("rope_local_base_freq",) if family.rope_local_base_freq is not None else ()
    return ("hidden_activation", *second_base)


def _computes(key: str) -> bool:
    if key in _HARMLESS or key.startswith("_") or "dropout" in key:  # "_": transformers' own notes
        return False
    return not _COMPUTES.isdisjoint(key.lower().split("_"))


def _is_off(key: str, value: Any) -> bool:
    if value is None or value is False or (isinstance(value, (list, dict, str)) and not value):
        return "causal" not in key or value is None
    if value is True:
        return "causal" in key
    # attention_multiplier, softmax_scale and their like stand for 1/sqrt(head_dim), and 1 is no
    # neutral value
    replaces_scale = any(word in key for word in ("attention", "attn", "softmax", "qk", "query"))
    if _FACTORS.search(key) and not replaces_scale:
        return value in (1, None)
    return value == 0
