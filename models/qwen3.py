"""Qwen3 (dense): RMSNorm on each head's q and k instead of Qwen2's biases (arXiv:2505.09388)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .config import ModelConfig
from .family import WINDOW_KEYS, Family, InGGUF, sizes, windowed_from_layer
from .switches import Switches

if TYPE_CHECKING:
    from .gguf_file import GGUFFile  # needs the gguf package


def _switches(config: ModelConfig) -> Switches:
    return Switches(qkv_bias=config.attention_bias, o_bias=config.attention_bias, qk_norm=True)


def _gguf(file: "GGUFFile", config: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in file.shapes, "use_sliding_window": False}


QWEN3 = Family(
    model_type="qwen3",
    hf_fields=sizes(
        num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, attention_bias=False
    ),
    rope_theta=10000.0,
    layers=windowed_from_layer,
    switches=_switches,
    reads=WINDOW_KEYS,
    in_gguf=InGGUF("qwen3", "Qwen3ForCausalLM", _gguf),
)
