"""Mistral 7B and its kin: Llama's layer with one sliding window for all (arXiv:2310.06825)."""

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .family import Family, sizes
from .switches import Switches


def _layers(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, tuple[str, ...] | None]:
    window = raw.get("sliding_window", 4096)  # null means none, an absent key the default
    return window, ("full_attention" if window is None else "sliding_attention",) * num_layers


def _switches(config: ModelConfig) -> Switches:
    return Switches()


MISTRAL = Family(
    hf_fields=sizes(num_key_value_heads=8, max_position_embeddings=131072),
    rope_theta=10000.0,
    layers=_layers,
    switches=_switches,
    reads=("sliding_window",),
)
