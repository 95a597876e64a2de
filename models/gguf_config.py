"""The Hugging Face config that a GGUF file's metadata stands for."""

import math
from typing import Any

import numpy as np

from .gguf_file import GGUFFile

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_GEMMA3_LAYERS_PER_GLOBAL_LAYER = 6
_GEMMA3_27B_LAYERS = 62  # the one size whose attention scale is not 1/sqrt(head_dim); the file does not state it


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """A config.json dict for the model in `file`.

    Raises ValueError for another architecture, a missing key, mixture-of-experts layers, and rope scaling that has no config.json form.
    """
    arch = _architecture(file)
    config = _common(file, arch)
    if arch == "qwen2":
        config["use_sliding_window"] = False
    if arch == "qwen3":
        config |= {"attention_bias": "blk.0.attn_q.bias" in file.shapes, "use_sliding_window": False}
    if arch == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in file.shapes, "mlp_bias": "blk.0.ffn_up.bias" in file.shapes}
        if config["model_type"] == "mistral":
            config["sliding_window"] = file.metadata.get("llama.attention.sliding_window")
    if arch == "gemma3":
        config |= _gemma3(file, config)
    return config


def generation_config_from_gguf(file: GGUFFile) -> dict[str, Any] | None:
    """A generation_config.json dict: the special token ids that the file states."""
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}") for name, key in _TOKEN_IDS.items()}
    ids = {name: value for name, value in ids.items() if value is not None}
    keys = [f"tokenizer.ggml.{key}" for key in ("eos_token_id", "eot_token_id")]
    end_ids = {file.metadata[key] for key in keys if key in file.metadata}
    return ids | ({"eos_token_id": sorted(end_ids)} if len(end_ids) > 1 else {}) or None


_TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}


def _architecture(file: GGUFFile) -> str:
    arch = file.metadata.get("general.architecture")
    if arch not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture must be one of {SUPPORTED_ARCHITECTURES}, given {arch!r}: "
            "use a model of one of these families (Mistral models are labelled 'llama' or 'mistral3'; 'mistral3' is not supported)"
        )
    if file.metadata.get(f"{arch}.expert_count", 0):
        raise ValueError(f"{file.path}: {arch}.expert_count must be 0, given {file.metadata[f'{arch}.expert_count']}: use a dense model")
    return arch


def _key(file: GGUFFile, name: str) -> Any:
    if name not in file.metadata:
        raise ValueError(f"{file.path} must state {name!r} in its metadata: convert the model to GGUF again with a current converter")
    return file.metadata[name]


def _common(file: GGUFFile, arch: str) -> dict[str, Any]:
    """What every architecture has."""
    model_type = {"gemma3": "gemma3_text"}.get(arch, arch)
    if arch == "llama" and "mistral" in str(file.metadata.get("general.name", "")).lower():
        model_type = "mistral"
    hidden, heads = _key(file, f"{arch}.embedding_length"), _key(file, f"{arch}.attention.head_count")
    if "token_embd.weight" not in file.shapes:
        raise ValueError(f"{file.path} must hold the tensor 'token_embd.weight': use a file with the whole model")
    config = {
        "model_type": model_type,
        "architectures": [_CLASSES[model_type]],
        "vocab_size": file.shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": _key(file, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _key(file, f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.metadata.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": file.metadata.get(f"{arch}.attention.key_length", hidden // heads),
        "max_position_embeddings": _key(file, f"{arch}.context_length"),
        "rms_norm_eps": _shortest(_key(file, f"{arch}.attention.layer_norm_rms_epsilon")),
        "rope_theta": file.metadata.get(f"{arch}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, arch),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    _check_uniform_heads(file, config)
    return config


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 -> 1e-05, what config.json would say."""
    return float(str(np.float32(value)))


def _check_uniform_heads(file: GGUFFile, config: dict[str, Any]) -> None:
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if isinstance(config[name], list):
            raise ValueError(f"{file.path}: {name} must be the same in every layer, given {config[name]}: use a model with uniform layers")


def _gemma3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3's additions. The file states the window; pattern, local rope base and attention scale are the family's."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    period = file.metadata.get("gemma3.attention.sliding_window_pattern", _GEMMA3_LAYERS_PER_GLOBAL_LAYER)
    if not isinstance(period, int):
        raise ValueError(
            f"{file.path}: gemma3.attention.sliding_window_pattern must be one integer, given {period}: convert the model again"
        )
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": _key(file, "gemma3.attention.sliding_window"),
        "layer_types": ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)],
        "rope_theta": file.metadata.get("gemma3.rope.freq_base", 1000000.0),
        "rope_local_base_freq": file.metadata.get("gemma3.rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == _GEMMA3_27B_LAYERS else config["head_dim"],
        "attention_bias": False,
        "attn_logit_softcapping": file.metadata.get("gemma3.attn_logit_softcapping"),
        "final_logit_softcapping": file.metadata.get("gemma3.final_logit_softcapping"),
    }


def _rope_scaling(file: GGUFFile, arch: str) -> dict[str, Any] | None:
    """config.json's rope_scaling, from the metadata or from the per-frequency divisors in rope_freqs.weight (Llama 3)."""
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "none")
    factor = file.metadata.get(f"{arch}.rope.scaling.factor", 1.0)
    original = file.metadata.get(f"{arch}.rope.scaling.original_context_length")
    if "rope_freqs.weight" in file.shapes:
        return _llama3_scaling(file, file.metadata.get(f"{arch}.rope.freq_base", 10000.0), original)
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ValueError(
        f"{file.path}: {arch}.rope.scaling.type must be 'none', 'linear' or 'yarn', given {kind!r}: use another file of the model"
    )


def _llama3_scaling(file: GGUFFile, theta: float, original: int | None) -> dict[str, Any] | None:
    """Recover Llama 3's scaling parameters from the divisors they produced; every released model uses 1, 4 and an 8192-token context."""
    divisors = file.read("rope_freqs.weight")
    if np.allclose(divisors, 1.0):
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": float(np.round(divisors.max(), 4)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original or 8192,
    }
    expected = _llama3_divisors(scaling, theta, len(divisors))
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(
            f"{file.path}: the divisors in rope_freqs.weight must be those of Llama 3 rope scaling {scaling}, "
            f"given {divisors.tolist()}: use the model's safetensors files, whose config.json states the scaling"
        )
    return scaling


def _llama3_divisors(scaling: dict[str, Any], theta: float, count: int) -> np.ndarray:
    """The divisor of each rotary frequency: 1 for short wavelengths, `factor` for long ones, a blend between. float64 [count]."""
    frequencies = theta ** -(np.arange(count) / count)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / scaling["factor"] + blend)
