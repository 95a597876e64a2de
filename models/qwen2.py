"""Qwen2 and Qwen2.5: Llama's layer with biases on q, k and v (arXiv:2407.10671)."""

from .config import ModelConfig
from .family import WINDOW_KEYS, Family, InGGUF, sizes, windowed_from_layer
from .switches import Switches


def _switches(config: ModelConfig) -> Switches:
    return Switches(qkv_bias=True)


QWEN2 = Family(
    model_type="qwen2",
    hf_fields=sizes(num_key_value_heads=32, max_position_embeddings=32768),
    rope_theta=10000.0,
    layers=windowed_from_layer,
    switches=_switches,
    reads=(*WINDOW_KEYS, "attention_bias"),  # whatever it says, biases are on q, k and v
    in_gguf=InGGUF("qwen2", "Qwen2ForCausalLM", lambda file, config: {"use_sliding_window": False}),
)
