"""From a parsed Hugging Face config.json to a `ModelConfig`."""

from collections.abc import Mapping
from typing import Any

from .config import COUNTS, REALS, ModelConfig, check_size
from .end_tokens import end_tokens
from .family import REQUIRED, Family
from .hf_keys import check_keys
from .hf_rope import read_rope
from .registry import TEXT_PART, family_of

_RENAMED = {"hidden_activation": "hidden_act"}
"""Keys of some families that mean a field with another name."""


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The config of a parsed Hugging Face config.json, in today's or the pre-5 layout.

    Raises:
        ValueError: an architecture, rope type or option that is not supported, or a value that
            cannot be right.
    """
    return ModelConfig(**_fields(raw))


def _fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`ModelConfig`'s fields by name."""
    ends = end_tokens(raw)
    raw = _text_part(raw)
    if not raw.get("model_type"):
        raise ValueError("config.json must name its model_type; add it, for example 'llama'.")
    family = family_of(raw["model_type"])
    for option in family.must_be_off:
        if raw.get(option):
            raise ValueError(
                f"{option}={raw[option]!r} is not supported for model_type={raw['model_type']!r}; "
                "it must be off."
            )
    check_keys(raw, family)
    fields = _plain_fields(raw, family)
    window, layer_types = family.layers(raw, fields["num_hidden_layers"])
    if raw.get("layer_types") is not None and tuple(raw["layer_types"]) != layer_types:
        raise ValueError(
            f"layer_types={raw['layer_types']!r} does not fit model_type={raw['model_type']!r}, "
            "whose layers are all alike; remove it, or use a model_type that mixes them."
        )
    rope = read_rope(
        raw, family.rope_theta, family.rope_local_base_freq, fields["max_position_embeddings"]
    )
    fields = {
        "model_type": raw["model_type"],
        "sliding_window": window,
        "layer_types": layer_types,
        **fields,
        **rope,
    }
    return _typed({**fields, **family.parts(raw), "stop_token_ids": ends})


def _text_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A multimodal checkpoint's text model, its own model_type, the outer tie_word_embeddings."""
    model_type = raw.get("model_type")
    if model_type not in TEXT_PART or "text_config" not in raw:
        return raw
    inner = {"model_type": TEXT_PART[model_type], **raw["text_config"]}
    if raw.get("tie_word_embeddings") is not None:
        inner["tie_word_embeddings"] = raw["tie_word_embeddings"]
    return inner


def _plain_fields(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The family's `hf_fields` from `raw`; absent or null keys take their default."""
    given = {key: value for key, value in raw.items() if value is not None}
    for key, name in _RENAMED.items():
        if key in given and given.setdefault(name, given[key]) != given[key]:
            raise ValueError(
                f"{name}={given[name]!r} and {key}={given[key]!r} must agree; correct config.json."
            )
    fields = {name: given.get(name, default) for name, default in family.hf_fields.items()}
    missing = [name for name, value in fields.items() if value is REQUIRED]
    if missing:
        raise ValueError(
            f"config.json lacks {', '.join(missing)}, which model_type={raw['model_type']!r} "
            "needs; add them."
        )
    stated = raw.get("num_key_value_heads", fields["num_key_value_heads"])
    if stated is None or fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    # used before ModelConfig checks the rest
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        check_size(name, fields[name])
    if fields["head_dim"] is None:
        fields["head_dim"] = _even_share(fields["hidden_size"], fields["num_attention_heads"])
    return fields


def _typed(fields: dict[str, Any]) -> dict[str, Any]:
    """Numbers in the types that `ModelConfig` declares: JSON may say 10000 for 10000.0."""
    for name, value in fields.items():
        if name in COUNTS and value is not None:
            check_size(name, value)
        if name in REALS and isinstance(value, int):
            fields[name] = float(value)
    return fields


def _even_share(hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise ValueError(
            f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_heads} "
            "where head_dim is not given; give head_dim in config.json."
        )
    return hidden_size // num_heads
