"""The Hugging Face config that a GGUF file's metadata stands for."""

from typing import Any

from .end_tokens import gguf_end_tokens
from .gguf_file import GGUFFile
from .gguf_keys import check_agreement, check_keys, number, shortest
from .gguf_rope import rope_scaling

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_GEMMA3_LAYERS_PER_GLOBAL_LAYER = 6
# the one size whose attention scale is not 1/sqrt(head_dim); the file does not state it
_GEMMA3_27B_LAYERS = 62


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """A config.json dict for the model in `file`.

    Raises ValueError for another architecture, a missing key, one that is not known, values that
    contradict each other, mixture-of-experts layers, and rope scaling that has no config.json form.
    """
    arch = _architecture(file)
    check_keys(file, arch)
    config = _common(file, arch)
    if arch == "qwen2":
        config["use_sliding_window"] = False
    if arch == "qwen3":
        config |= {
            "attention_bias": "blk.0.attn_q.bias" in file.shapes,
            "use_sliding_window": False,
        }
    if config["model_type"] == "llama":
        config |= {
            "attention_bias": "blk.0.attn_q.bias" in file.shapes,
            "mlp_bias": "blk.0.ffn_up.bias" in file.shapes,
        }
    if config["model_type"] == "mistral":
        config["sliding_window"] = file.metadata.get("llama.attention.sliding_window") or None
    if arch == "gemma3":
        config |= _gemma3(file, config)
    check_agreement(file, arch, config)
    return config


def generation_config_from_gguf(file: GGUFFile) -> dict[str, Any] | None:
    """A generation_config.json dict: the special token ids that the file states."""
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}") for name, key in _TOKEN_IDS.items()}
    ids = {name: value for name, value in ids.items() if value is not None}
    ends = gguf_end_tokens(file.metadata)
    return ids | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}) or None


_TOKEN_IDS = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}


def _architecture(file: GGUFFile) -> str:
    arch = file.metadata.get("general.architecture")
    if arch not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture must be one of {SUPPORTED_ARCHITECTURES}, given "
            f"{arch!r}: use a model of one of these families (Mistral models are labelled 'llama' "
            "or 'mistral3'; 'mistral3' is not supported)"
        )
    if file.metadata.get(f"{arch}.expert_count", 0):
        raise ValueError(
            f"{file.path}: {arch}.expert_count must be 0, given "
            f"{file.metadata[f'{arch}.expert_count']}: use a dense model"
        )
    return arch


def _key(file: GGUFFile, name: str) -> Any:
    if name not in file.metadata:
        raise ValueError(
            f"{file.path} must state {name!r} in its metadata: convert the model to GGUF again "
            "with a current converter"
        )
    return file.metadata[name]


def _common(file: GGUFFile, arch: str) -> dict[str, Any]:
    """What every architecture has."""
    model_type = {"gemma3": "gemma3_text"}.get(arch, arch)
    named = "mistral" in str(file.metadata.get("general.name", "")).lower()
    if arch == "llama" and (named or file.metadata.get("llama.attention.sliding_window")):
        model_type = "mistral"
    hidden = _size(file, f"{arch}.embedding_length")
    heads = _size(file, f"{arch}.attention.head_count")
    head_dim = _head_dim(file, arch, hidden, heads)
    if "token_embd.weight" not in file.shapes:
        raise ValueError(
            f"{file.path} must hold the tensor 'token_embd.weight': use a file with the whole model"
        )
    config = {
        "model_type": model_type,
        "architectures": [_CLASSES[model_type]],
        "vocab_size": file.shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": _size(file, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _size(file, f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _size(file, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _size(file, f"{arch}.context_length"),
        "rms_norm_eps": shortest(_key(file, f"{arch}.attention.layer_norm_rms_epsilon")),
        "rope_theta": number(file, f"{arch}.rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(file, arch, head_dim),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return config


_PER_LAYER = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
}


def _size(file: GGUFFile, key: str, default: int | None = None) -> int:
    """The integer at `key`; where the file has a list, one value a layer, they must agree."""
    value = _key(file, key) if default is None else file.metadata.get(key, default)
    if isinstance(value, list) and value:
        name = _PER_LAYER.get(key.split(".", 1)[1], key)
        if len(set(value)) > 1:
            raise ValueError(
                f"{file.path}: {name} must be the same in every layer, given {value}: use a model "
                "with uniform layers"
            )
        value = value[0]
    if type(value) is not int or value < 1:
        raise ValueError(
            f"{file.path}: {key}={value!r} must be an integer of at least 1: convert the model to "
            "GGUF again"
        )
    return value


def _head_dim(file: GGUFFile, arch: str, hidden: int, heads: int) -> int:
    key = f"{arch}.attention.key_length"
    if key not in file.metadata and hidden % heads:
        raise ValueError(
            f"{file.path}: {arch}.embedding_length={hidden} must be a multiple of "
            f"{arch}.attention.head_count={heads} where {key} is not given: convert the model to "
            "GGUF again"
        )
    return _size(file, key, hidden // heads)


def _gemma3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3's additions: the file states the window, the rest are the family's own."""
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    period = file.metadata.get(
        "gemma3.attention.sliding_window_pattern", _GEMMA3_LAYERS_PER_GLOBAL_LAYER
    )
    if type(period) is not int or period < 1:
        raise ValueError(
            f"{file.path}: gemma3.attention.sliding_window_pattern must be one integer, given "
            f"{period}: convert the model again"
        )
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": _size(file, "gemma3.attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)
        ],
        "rope_theta": number(file, "gemma3.rope.freq_base", 1000000.0),
        "rope_local_base_freq": number(file, "gemma3.rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": config["hidden_size"] // heads
        if layers == _GEMMA3_27B_LAYERS
        else config["head_dim"],
        "attention_bias": False,
        "attn_logit_softcapping": number(file, "gemma3.attn_logit_softcapping", None) or None,
        "final_logit_softcapping": number(file, "gemma3.final_logit_softcapping", None) or None,
    }
