"""The keys that a GGUF file states about its model: read, known as harmless, or refused."""

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .gguf_file import GGUFFile  # needs the gguf package


_READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier",
}
_HARMLESS = {
    "rope.scaling.finetuned": "how the model was trained",
    "attention.layer_norm_epsilon": "of LayerNorm; these architectures have RMSNorm",
    "attention.group_norm_epsilon": "of GroupNorm; these architectures have RMSNorm",
    "attention.group_norm_groups": "of GroupNorm; these architectures have RMSNorm",
    "expert_used_count": "of experts, whose expert_count must be 0",
    "tensor_data_layout": "where the rows of Q and K came from; the architecture settles where "
    "they are",
    "pooling_type": "how llama.cpp makes one embedding of a text; no logits depend on it",
}
"""Keys behind the architecture's name that change no logits, and why."""

_OFF_AT_ONE = ("logit_scale", "residual_scale", "embedding_scale")


def check_keys(file: "GGUFFile", arch: str, reads: Collection[str]) -> None:
    """Raise ValueError, names and values, for keys that are neither read (by every architecture,
    or of `reads` by this one) nor harmless.

    Nothing is said against a value that turns the key off, as in llama.cpp: 0, false, or 1 for a
    plain scale.
    """
    known = {*_READ, *reads, *_HARMLESS}
    ours = {
        key.removeprefix(f"{arch}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{arch}.")
    }
    unknown = {
        key: value for key, value in ours.items() if key not in known and not _is_off(key, value)
    }
    if unknown:
        listed = ", ".join(
            f"{arch}.{key}={shown(value)!r}" for key, value in sorted(unknown.items())
        )
        raise ValueError(
            f"{file.path} states {listed}, which this reader does not know and which may change "
            f"the computation: use a model of plain architecture {arch!r}, or its safetensors files"
        )


def _is_off(key: str, value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(not v or (key in _OFF_AT_ONE and v == 1) for v in values)


def check_agreement(file: "GGUFFile", arch: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError where the file contradicts itself, or the model that `config` describes."""
    width = config["head_dim"]
    scale = (config.get("query_pre_attn_scalar") or width) ** -0.5
    for name, must, why in (
        ("attention.value_length", width, "keys and values have one width in these architectures"),
        (
            "rope.dimension_count",
            width,
            "the rotary embedding must cover the whole head, not part of it",
        ),
        ("attention.causal", True, "only causal attention is supported"),
        ("vocab_size", config["vocab_size"], "token_embd.weight has that many rows"),
        ("attention.scale", scale, "it is the factor on q . k in this architecture"),
    ):
        value = file.metadata.get(f"{arch}.{name}", must)
        if name == "attention.scale" and not value:  # llama.cpp: not set
            continue
        if not math.isclose(number(file, f"{arch}.{name}", must), must, rel_tol=1e-5):
            raise ValueError(
                f"{file.path}: {arch}.{name}={shown(value)!r} is not supported, it must be "
                f"{must!r}: {why}; use the model's safetensors files, or convert it again"
            )
    tokens = file.metadata.get("tokenizer.ggml.tokens") or []
    if len(tokens) > config["vocab_size"]:
        raise ValueError(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} entries, and token_embd.weight "
            f"only {config['vocab_size']} rows: convert the model to GGUF again"
        )


def needed(file: "GGUFFile", name: str) -> Any:
    if name not in file.metadata:
        raise ValueError(
            f"{file.path} must state {name!r} in its metadata: convert the model to GGUF again "
            "with a current converter"
        )
    return file.metadata[name]


_PER_LAYER = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
}


def size(file: "GGUFFile", key: str, default: int | None = None) -> int:
    """The integer at `key`; where the file has a list, one value a layer, they must agree."""
    value = needed(file, key) if default is None else file.metadata.get(key, default)
    if isinstance(value, list) and value:
        name = _PER_LAYER.get(key.split(".", 1)[1], key)
        if len(set(value)) > 1:
            raise ValueError(
                f"{file.path}: {name} must be the same in every layer, given {value}: use a model "
                "with uniform layers"
            )
        value = value[0]
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{file.path}: {key}={value!r} must be an integer of at least 1: convert the model to "
            "GGUF again"
        )
    return value


def number(file: "GGUFFile", key: str, default: Any) -> Any:
    """The number at `key` as the shortest decimal of its float32 (9.9999997e-06 -> 1e-05)."""
    value = file.metadata.get(key, default)
    if value is not None and not isinstance(value, (int, float)):
        raise ValueError(
            f"{file.path}: {key}={value!r} must be a number: convert the model to GGUF again"
        )
    return shown(value)


def shown(value: Any) -> Any:
    """`value`, a float as its shortest decimal."""
    return shortest(value) if isinstance(value, float) else value


def shortest(value: float) -> float:
    """What config.json would say for a float32."""
    return float(str(np.float32(value)))
