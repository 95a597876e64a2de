"""A GGUF file as a source of weights: tensor names and values as Hugging Face has them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .gguf_config import config_from_gguf, generation_config_from_gguf
from .gguf_file import GGUFFile
from .registry import FAMILIES
from .source import TensorInfo, check_unique, float_type

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
_NAME = re.compile(r"^(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<leaf>weight|bias)$")
_IGNORED = {"rope_freqs.weight": "rotary divisors, held in the config as rope_scaling"}
_IGNORED_IN_LAYER = re.compile(r"^blk\.\d+\.attn_rot_embd\.weight$")


class GGUFSource:
    """One GGUF file. Matrices are dequantized to float32 one at a time.

    Values that GGUF stores differently, as the family's `InGGUF` says, are put back. Raises
    ValueError for what `GGUFFile` and `config_from_gguf` refuse.
    """

    def __init__(self, path: Path):
        self._file = GGUFFile(path)
        self.config = config_from_gguf(self._file)
        self.generation_config = generation_config_from_gguf(self._file)
        kept_as = FAMILIES[self.config["model_type"]].in_gguf
        assert kept_as is not None  # `config_from_gguf` found it there
        self._kept_as, self._in_layer = kept_as, {**_IN_LAYER, **kept_as.names}
        self.ignored = {
            name: reason
            for name in self._file.shapes
            if (reason := _ignored_reason(name)) is not None
        }
        kept = [name for name in self._file.shapes if name not in self.ignored]
        self._names = {name: self._hf_name(name) for name in kept}
        check_unique(path, self._names)
        self.tensors = {
            self._names[name]: TensorInfo(self._file.shapes[name], self._file.types[name])
            for name in kept
        }
        self.dtype = float_type(self.tensors)

    def stream(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """(name, first row, float32 rows), a piece of a tensor at a time."""
        for stored, name in self._names.items():
            if heads := self._rotated_heads(name):
                yield name, 0, split_rotary_halves(self._file.read(stored), self.config[heads])
                continue
            one = self._kept_as.norms_plus_one and name.endswith("norm.weight")
            for start, rows in self._file.pieces(stored):
                yield name, start, rows - 1.0 if one else rows

    def tokenizer(self) -> Any | None:
        from .gguf_tokenizer import tokenizer_from_gguf

        return tokenizer_from_gguf(self._file.metadata)

    def _hf_name(self, name: str) -> str:
        """The Hugging Face name, or `name` itself without one: the loader lists it as unused."""
        match = _NAME.match(name)
        if match is None:
            return name
        layer, part, leaf = match["layer"], match["part"], match["leaf"]
        table = _TOP if layer is None else self._in_layer
        if part not in table:
            return name
        return (
            f"{table[part]}.{leaf}"
            if layer is None
            else f"model.layers.{layer}.{table[part]}.{leaf}"
        )

    def _rotated_heads(self, name: str) -> str | None:
        """The field with the number of heads of a tensor whose rotated pairs are side by side."""
        if self._kept_as.rotated_side_by_side:
            for tensor, heads in _HEADS.items():
                if f".self_attn.{tensor}." in name:
                    return heads
        return None


def split_rotary_halves(value: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a Q or K projection from GGUF's order to Hugging Face's, per head: [0, 1, 2, 3, ...]
    -> [0, 2, ..., 1, 3, ...].

    GGUF puts the two components of each rotated pair side by side; Hugging Face puts all first
    components before all second ones. value: [num_heads * head_dim, in] or [num_heads * head_dim].
    """
    rows = value.shape[0]
    if rows % (2 * num_heads):
        raise ValueError(
            f"a Q or K projection's rows must be a multiple of 2 * num_heads, given {rows} rows "
            f"and {num_heads=}: use an intact file"
        )
    pairs = value.reshape(num_heads, rows // num_heads // 2, 2, *value.shape[1:])
    return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(value.shape)


def _ignored_reason(name: str) -> str | None:
    if _IGNORED_IN_LAYER.match(name):
        return "rotary buffer, computed from the config"
    return _IGNORED.get(name)
