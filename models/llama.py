"""Llama 2 and 3, and models of that layout such as SmolLM2 (arXiv:2307.09288, 2407.21783)."""

from .config import ModelConfig
from .family import Family, all_full, sizes
from .switches import Switches


def _switches(config: ModelConfig) -> Switches:
    return Switches(
        qkv_bias=config.attention_bias, o_bias=config.attention_bias, mlp_bias=config.mlp_bias
    )


LLAMA = Family(
    hf_fields=sizes(max_position_embeddings=2048, attention_bias=False, mlp_bias=False),
    rope_theta=10000.0,
    layers=all_full,
    switches=_switches,
)
