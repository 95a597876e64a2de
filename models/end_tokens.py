"""End tokens: ids at which a model's text is over, from Hugging Face's JSON or GGUF metadata."""

from collections.abc import Mapping
from typing import Any

_GGUF_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_GGUF_TEXTS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
)
"""Tokens that llama.cpp ends at by their text. It also ends at "</s>", "<eos>" and
fill-in-the-middle marks, which are ordinary text in some vocabularies (Gemma's "</s>" is an HTML
tag): those count only where a key names them."""


def with_generation_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """`config` with generation_config.json's end tokens, if any: they win, as in `transformers`."""
    ends = None if generation is None else generation.get("eos_token_id")
    return dict(config) if ends is None else {**config, "eos_token_id": ends}


def end_tokens(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """eos_token_id of a parsed config.json, an id or a list of them, each once, in order.

    A multimodal config may have it outside or in its text_config; outside wins.

    Raises:
        ValueError: it holds something that is no integer.
    """
    text = raw.get("text_config")
    sources = [raw, text] if isinstance(text, Mapping) else [raw]
    stated = [
        source["eos_token_id"] for source in sources if source.get("eos_token_id") is not None
    ]
    if not stated:
        return ()
    ids = stated[0] if isinstance(stated[0], (list, tuple)) else [stated[0]]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(
            f"eos_token_id={stated[0]!r} must be a token id or a list of token ids; correct it in "
            "generation_config.json or config.json."
        )
    return tuple(dict.fromkeys(ids))


def gguf_end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """The ids that a GGUF file's keys name, and those of tokens that llama.cpp ends at by their
    text, in ascending order.
    """
    named = [metadata.get(f"tokenizer.ggml.{key}") for key in _GGUF_KEYS]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    found = [i for i, token in enumerate(tokens) if token in _GGUF_TEXTS]
    return sorted({*(i for i in named if i is not None), *found})
