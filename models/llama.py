"""Llama 2 and 3, and models of that layout such as SmolLM2 (arXiv:2307.09288, 2407.21783)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .config import ModelConfig
from .family import Family, InGGUF, all_full, sizes
from .switches import Switches

if TYPE_CHECKING:
    from .gguf_file import GGUFFile  # needs the gguf package


def _switches(config: ModelConfig) -> Switches:
    return Switches(
        qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias
    )


def _gguf(file: "GGUFFile", config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention_bias": "blk.0.attn_q.bias" in file.shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in file.shapes,
    }


LLAMA = Family(
    model_type="llama",
    hf_fields=sizes(max_position_embeddings=2048, attention_bias=False, mlp_bias=False),
    rope_theta=10000.0,
    layers=all_full,
    switches=_switches,
    in_gguf=InGGUF("llama", "LlamaForCausalLM", _gguf, rotated_side_by_side=True),
)
