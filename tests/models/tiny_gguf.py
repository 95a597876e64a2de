"""A Llama of one layer as a GGUF file."""

from pathlib import Path
from typing import Any

from helpers_model import tiny_config, tiny_tensors, write_model_gguf

CONFIG = tiny_config("llama", max_position_embeddings=64, rope_theta=10000.0, num_hidden_layers=1)
TENSORS = tiny_tensors(CONFIG) | {
    name: value * 8
    for name, value in tiny_tensors(CONFIG).items()
    if "q_proj" in name or "k_proj" in name
}


def file_with(path: Path, keys: dict[str, Any]) -> Path:
    return write_model_gguf(
        path, CONFIG, TENSORS, **{f"llama__{key}": value for key, value in keys.items()}
    )
