"""`Family`: what a family's file has to say, namely its config.json habits and its switches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import ModelConfig
from .switches import Switches

REQUIRED = object()
"""Stands in `Family.hf_fields` for a key that config.json must hold."""


def sizes(**changes: Any) -> dict[str, Any]:
    """The config.json keys that every family reads, and defaults; None follows from others."""
    common = {
        "vocab_size": REQUIRED,
        "hidden_size": REQUIRED,
        "intermediate_size": REQUIRED,
        "num_hidden_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": REQUIRED,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    return {**common, **changes}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        hf_fields: the config.json keys read straight into `ModelConfig`, each with the value that
            `transformers` assumes where the key is absent (checkpoints leave defaults out), or
            REQUIRED.
        rope_theta: the base that is assumed where config.json names none.
        layers: from the raw config and the number of layers, (sliding_window, layer_types); None
            types = all alike.
        switches: which parts of the stack this family has.
        rope_local_base_freq: likewise for the sliding_attention layers of a family with two bases,
            else None.
        parts: from the raw config, `ModelConfig` fields of this family alone; they come before all
            others.
        reads: the other config.json keys that `layers` and `parts` read.
        must_be_off: options that change the computation and are not supported, refused when set.
    """

    hf_fields: Mapping[str, Any]
    rope_theta: float
    layers: Callable[[Mapping[str, Any], int], tuple[int | None, tuple[str, ...] | None]]
    switches: Callable[[ModelConfig], Switches]
    rope_local_base_freq: float | None = None
    reads: tuple[str, ...] = ()
    must_be_off: tuple[str, ...] = ()
    parts: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda raw: {}


def all_full(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, tuple[str, ...] | None]:
    """`Family.layers` of a family whose layers all attend to the whole context."""
    return None, ("full_attention",) * num_layers


WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers")
"""What `windowed_from_layer` reads."""


def windowed_from_layer(
    raw: Mapping[str, Any], num_layers: int
) -> tuple[int | None, tuple[str, ...] | None]:
    """`Family.layers` of Qwen2 and 3: if `use_sliding_window`, from `max_window_layers` on."""
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window") else None
    if raw.get("layer_types") is not None:
        return window, tuple(raw["layer_types"])
    first = raw.get("max_window_layers", 28) if window is not None else num_layers
    return window, tuple(
        "full_attention" if i < first else "sliding_attention" for i in range(num_layers)
    )
