"""The tokenizer that a GGUF file's metadata describes, rebuilt with `tokenizers`. No PyTorch.

Two kinds exist among the supported families: byte-level BPE ("gpt2": SmolLM, Llama 3, Qwen, Mistral
Nemo) and SentencePiece BPE with byte fallback ("llama": Llama 2, Mistral, Gemma). Neither stores
everything a tokenizer.json does: the splitting pattern is named, not written, and SentencePiece
merges are implied by the scores.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_USE_ANOTHER = (
    "put the model's tokenizer.json in a folder and pass that folder as load_pretrained(..., "
    "tokenizer=folder)"
)


def tokenizer_from_gguf(metadata: dict[str, Any]) -> PreTrainedTokenizerFast | None:
    """The tokenizer in `metadata`, or None if it holds none.

    Raises ValueError for another kind of tokenizer, an unknown splitting pattern, and incomplete
    metadata.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    if kind not in _BUILDERS:
        raise ValueError(
            f"tokenizer.ggml.model must be one of {sorted(_BUILDERS)}, given {kind!r}: "
            f"{_USE_ANOTHER}"
        )
    tokens = _required(metadata, "tokens")
    tokenizer = _BUILDERS[kind](metadata, tokens)
    _mark_special_tokens(tokenizer, metadata, tokens)
    return _wrap(tokenizer, metadata, tokens)


def _required(metadata: dict[str, Any], name: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"the GGUF file must state a non-empty 'tokenizer.ggml.{name}', given {value!r}: "
            f"{_USE_ANOTHER}"
        )
    return value


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """GPT-2 style: text is split by a pattern, spelt in 256 byte letters, and merged."""
    split = metadata.get("tokenizer.ggml.pre", "default")
    if split not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {sorted(_SPLITS)}, given {split!r}: {_USE_ANOTHER}"
        )
    merges = [_pair(merge) for merge in _required(metadata, "merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=split in _WHOLE_WORDS_FIRST))
    tokenizer.normalizer = normalizers.NFC() if split in _NFC else None
    tokenizer.pre_tokenizer = _SPLITS[split]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _by_pattern(pattern: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2_words() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2_words()])


_SPLITS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2_words,
    "gpt-2": _gpt2_words,
    "smollm": _digits_then_gpt2_words,
    "llama3": _by_pattern(_LLAMA3_WORDS),
    "llama-v3": _by_pattern(_LLAMA3_WORDS),
    "llama-bpe": _by_pattern(_LLAMA3_WORDS),
    "qwen2": _by_pattern(_QWEN2_WORDS),
    "deepseek-r1-qwen": _by_pattern(_QWEN2_WORDS),
    "tekken": _by_pattern(_TEKKEN_WORDS),
}
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe")
_WHOLE_WORDS_FIRST = (*_LLAMA3, "tekken")  # a whole token is not merged up from bytes
_NFC = ("qwen2", "deepseek-r1-qwen")


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE: spaces are U+2581, unknown characters are bytes such as <0x0A>."""
    gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    if gemma:  # its runs of spaces are stored as plain spaces
        tokens[:] = [
            "▁" * len(token) if len(token) > 1 and not token.strip(" ") else token
            for token in tokens
        ]
    # Gemma's scores do not follow its merge order; the order of its tokens does.
    ranks = [-float(i) for i in range(len(tokens))] if gemma else _required(metadata, "scores")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    model = BPE(
        {token: i for i, token in enumerate(tokens)},
        _implied_merges(tokens, ranks),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else tokens[unknown],
    )
    tokenizer = Tokenizer(model)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", not gemma):
        # At the start and after each special token, as llama.cpp does; a text's own leading space
        # comes on top, as in SentencePiece.
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        parts.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _implied_merges(tokens: Sequence[str], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to cut a token into two tokens, best-ranked token first: SentencePiece merges the
    pair whose union ranks highest.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    order = sorted(range(len(tokens)), key=lambda i: -ranks[i])
    merges: list[tuple[str, str]] = []
    for i in order:
        token = tokens[i]
        cuts = [
            (token[:k], token[k:])
            for k in range(1, len(token))
            if token[:k] in ids and token[k:] in ids
        ]
        merges.extend(sorted(cuts, key=lambda cut: (ids[cut[0]], ids[cut[1]])))
    return merges


_BUILDERS: dict[str, Callable[[dict[str, Any], list[str]], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _mark_special_tokens(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Control tokens are matched whole and skipped in decoding, user-defined ones printed."""
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    plain = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in control]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _wrap(
    tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]
) -> PreTrainedTokenizerFast:
    """The Hugging Face object around it: named special tokens, BOS and EOS rules, chat template."""
    ids = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    names = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in ids.items()}
    sentencepiece = metadata["tokenizer.ggml.model"] == "llama"
    starts_with_bos = sentencepiece or metadata.get("tokenizer.ggml.pre") in _LLAMA3
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: tokens[index] for name, index in names.items() if index is not None},
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", starts_with_bos),
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
    )
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped
