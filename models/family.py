"""`Family`: what a family's file has to say, namely its config.json habits and its switches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .config import ModelConfig
from .switches import Switches

if TYPE_CHECKING:
    from .gguf_file import GGUFFile  # needs the gguf package

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
class InGGUF:
    """How GGUF files keep models of a family.

    Attributes:
        arch: their general.architecture.
        hf_class: the class that config.json names under "architectures".
        config: from the file and the keys that every architecture has, the config.json keys of this
            family alone.
        reads: keys behind the architecture's name that `config` reads.
        of: whether a file is of this family, where its architecture is also another one's, which
            takes the others.
        names: modules of a layer by their GGUF names, where they differ from the usual ones
            (gguf_source.py).
        rotated_side_by_side: whether the two components of each rotated pair are neighbours in the
            rows of Q and K.
        norms_plus_one: whether norm weights are stored with 1 added.
    """

    arch: str
    hf_class: str
    config: Callable[["GGUFFile", Mapping[str, Any]], Mapping[str, Any]]
    reads: tuple[str, ...] = ()
    of: Callable[["GGUFFile"], bool] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    rotated_side_by_side: bool = False
    norms_plus_one: bool = False


FAMILIES: dict[str, "Family"] = {}
"""All families by `model_type`; each puts itself here."""


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        model_type: what config.json calls it.
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
        in_gguf: how GGUF files keep it; None: they are not read.
        text_of: the multimodal model type whose text model this is.
        must_be_off: options that change the computation and are not supported, refused when set.
    """

    model_type: str
    hf_fields: Mapping[str, Any]
    rope_theta: float
    layers: Callable[[Mapping[str, Any], int], tuple[int | None, tuple[str, ...] | None]]
    switches: Callable[[ModelConfig], Switches]
    rope_local_base_freq: float | None = None
    reads: tuple[str, ...] = ()
    must_be_off: tuple[str, ...] = ()
    parts: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda raw: {}
    in_gguf: InGGUF | None = None
    text_of: str | None = None

    def __post_init__(self) -> None:
        FAMILIES[self.model_type] = self


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
