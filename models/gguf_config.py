"""The Hugging Face config that a GGUF file's metadata stands for."""

from typing import Any

from .end_tokens import gguf_end_tokens
from .family import InGGUF
from .gguf_file import GGUFFile
from .gguf_keys import check_agreement, check_keys, needed, number, shortest, size
from .gguf_rope import rope_scaling
from .registry import FAMILIES


def config_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """A config.json dict for the model in `file`.

    Raises ValueError for another architecture, a missing key, one that is not known, values that
    contradict each other, mixture-of-experts layers, and rope scaling that has no config.json form.
    """
    model_type, kept, reads = _stored(file)
    check_keys(file, kept.arch, reads)
    config = {"model_type": model_type, "architectures": [kept.hf_class]}
    two_bases = FAMILIES[model_type].rope_local_base_freq is not None
    config |= _common(file, kept.arch, two_bases)
    config |= kept.config(file, config)
    check_agreement(file, kept.arch, config)
    return config


def generation_config_from_gguf(file: GGUFFile) -> dict[str, Any] | None:
    """A generation_config.json dict: the special token ids that the file states."""
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}") for name, key in _TOKEN_IDS.items()}
    ids = {name: value for name, value in ids.items() if value is not None}
    ends = gguf_end_tokens(file.metadata)
    return ids | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}) or None


_TOKEN_IDS = {"bos_token_id": "bos_token_id", "pad_token_id": "padding_token_id"}


def _stored(file: GGUFFile) -> tuple[str, InGGUF, set[str]]:
    """The model type of a file, how its family is kept, and the keys that are read of its
    architecture.
    """
    arch, known = file.metadata.get("general.architecture"), {}
    for name, family in FAMILIES.items():
        if family.in_gguf is not None:
            known.setdefault(family.in_gguf.arch, []).append((name, family.in_gguf))
    if arch not in known:
        raise ValueError(
            f"{file.path}: general.architecture must be one of {tuple(known)}, given "
            f"{arch!r}: use a model of one of these families (Mistral models are labelled 'llama' "
            "or 'mistral3'; 'mistral3' is not supported)"
        )
    if file.metadata.get(f"{arch}.expert_count", 0):
        raise ValueError(
            f"{file.path}: {arch}.expert_count must be 0, given "
            f"{file.metadata[f'{arch}.expert_count']}: use a dense model"
        )
    reads = {key for _, kept in known[arch] for key in kept.reads}
    own = [(name, kept) for name, kept in known[arch] if kept.of is not None and kept.of(file)]
    others = [(name, kept) for name, kept in known[arch] if kept.of is None]
    return *(own or others)[0], reads


def _common(file: GGUFFile, arch: str, two_bases: bool) -> dict[str, Any]:
    """What every architecture has."""
    hidden = size(file, f"{arch}.embedding_length")
    heads = size(file, f"{arch}.attention.head_count")
    head_dim = _head_dim(file, arch, hidden, heads)
    if "token_embd.weight" not in file.shapes:
        raise ValueError(
            f"{file.path} must hold the tensor 'token_embd.weight': use a file with the whole model"
        )
    config = {
        "vocab_size": file.shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": size(file, f"{arch}.feed_forward_length"),
        "num_hidden_layers": size(file, f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size(file, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": size(file, f"{arch}.context_length"),
        "rms_norm_eps": shortest(needed(file, f"{arch}.attention.layer_norm_rms_epsilon")),
        "rope_theta": number(file, f"{arch}.rope.freq_base", 10000.0),
        "rope_scaling": rope_scaling(file, arch, head_dim, two_bases),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.shapes,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return config


def _head_dim(file: GGUFFile, arch: str, hidden: int, heads: int) -> int:
    key = f"{arch}.attention.key_length"
    if key not in file.metadata and hidden % heads:
        raise ValueError(
            f"{file.path}: {arch}.embedding_length={hidden} must be a multiple of "
            f"{arch}.attention.head_count={heads} where {key} is not given: convert the model to "
            "GGUF again"
        )
    return size(file, key, hidden // heads)
