"""Qwen3 (dense): RMSNorm on each head's q and k instead of Qwen2's biases (arXiv:2505.09388)."""

from .config import ModelConfig
from .family import WINDOW_KEYS, Family, sizes, windowed_from_layer
from .switches import Switches


def _switches(config: ModelConfig) -> Switches:
    return Switches(qkv_bias=config.attention_bias, o_bias=config.attention_bias, qk_norm=True)


QWEN3 = Family(
    hf_fields=sizes(
        num_key_value_heads=32, head_dim=128, max_position_embeddings=32768, attention_bias=False
    ),
    rope_theta=10000.0,
    layers=windowed_from_layer,
    switches=_switches,
    reads=WINDOW_KEYS,
)
