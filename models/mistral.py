"""Mistral 7B and its kin: Llama's layer with one sliding window for all (arXiv:2310.06825)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .config import ModelConfig
from .family import Family, InGGUF, sizes
from .switches import Switches

if TYPE_CHECKING:
    from .gguf_file import GGUFFile  # needs the gguf package


def _layers(raw: Mapping[str, Any], num_layers: int) -> tuple[int | None, tuple[str, ...] | None]:
    window = raw.get("sliding_window", 4096)  # null means none, an absent key the default
    return window, ("full_attention" if window is None else "sliding_attention",) * num_layers


def _switches(config: ModelConfig) -> Switches:
    return Switches()


_GGUF_WINDOW = "llama.attention.sliding_window"


def _gguf(file: "GGUFFile", config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": file.metadata.get(_GGUF_WINDOW) or None}


def _of_mistral(file: "GGUFFile") -> bool:
    """GGUF files label it as a Llama."""
    named = "mistral" in str(file.metadata.get("general.name", "")).lower()
    return named or bool(file.metadata.get(_GGUF_WINDOW))


MISTRAL = Family(
    model_type="mistral",
    hf_fields=sizes(num_key_value_heads=8, max_position_embeddings=131072),
    rope_theta=10000.0,
    layers=_layers,
    switches=_switches,
    reads=("sliding_window",),
    in_gguf=InGGUF(
        "llama",
        "MistralForCausalLM",
        _gguf,
        reads=("attention.sliding_window",),
        of=_of_mistral,
        rotated_side_by_side=True,
    ),
)
