"""Tokenizers rebuilt from GGUF metadata, against the tokenizer that the metadata was taken from."""

from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
from diffkv_jax.models.gguf_tokenizer import tokenizer_from_gguf  # noqa: E402

CORPUS = [
    "the cat sat on the mat 1234 times",
    "It's 12:30, isn't it?  \n\n  def f(x):\n    return x",
    "naïve café 日本語 🙂",
] * 4
TEXTS = [*CORPUS, "<s>the</s> cat", "a  1 and 22\t333", " leading", "e\u0301 decomposed", ""]
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
WORDS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def trained(split: str) -> Any:
    """A byte-level tokenizer set up as the families' tokenizer.json are, trained on CORPUS."""
    pre = tokenizers.pre_tokenizers
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=split == "llama-bpe"))
    if split in WORDS:
        words = pre.Split(tokenizers.Regex(WORDS[split]), "isolated")
        backend.pre_tokenizer = pre.Sequence(
            [words, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    elif split == "smollm":
        backend.pre_tokenizer = pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
    else:
        backend.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    if split == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def metadata_of(backend: Any, split: str, **changes: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for it."""
    import json

    vocab = backend.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = json.loads(backend.to_str())["model"]["merges"]
    base = {
        "general.architecture": "llama",
        "llama.context_length": 256,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            CONTROL if token in ("<s>", "</s>") else NORMAL for token in tokens
        ],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}",
    }
    return base | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize("split", ["smollm", "llama-bpe", "qwen2", "gpt-2"])
def test_byte_level(split: str) -> None:
    backend = trained(split)
    rebuilt = tokenizer_from_gguf(metadata_of(backend, split))
    assert rebuilt is not None
    for text in TEXTS:
        assert rebuilt.encode(text) == backend.encode(text).ids, text
        kept = rebuilt.decode(rebuilt.encode(text))
        assert kept == (backend.normalizer.normalize_str(text) if split == "qwen2" else text)
    assert (
        rebuilt.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False)
        == "<s>cat</s>"
    )
    assert (rebuilt.bos_token, rebuilt.eos_token, rebuilt.model_max_length) == ("<s>", "</s>", 256)
    assert rebuilt.decode(rebuilt.encode("<s>the</s>"), skip_special_tokens=True) == "the"


def test_the_splits_differ() -> None:
    backend = trained("gpt-2")
    encoded = {}
    for split in ("smollm", "llama-bpe", "qwen2"):
        rebuilt = tokenizer_from_gguf(metadata_of(backend, split))
        assert rebuilt is not None
        encoded[split] = tuple(rebuilt.encode("the cat sat 1234 times  12 \n\n it's"))
    assert len(set(encoded.values())) == 3


def test_bos_is_added_where_the_file_says_so() -> None:
    backend = trained("smollm")
    for flags, expected in (({"add_bos_token": True}, [0]), ({"add_bos_token": False}, [])):
        rebuilt = tokenizer_from_gguf(metadata_of(backend, "smollm", **flags))
        assert rebuilt is not None and rebuilt.encode("") == expected
        assert rebuilt.encode("cat") == expected + backend.encode("cat").ids
    llama3 = metadata_of(trained("llama-bpe"), "llama-bpe")
    del llama3["tokenizer.ggml.add_bos_token"]  # Llama 3 files may leave the flag out and mean yes
    rebuilt = tokenizer_from_gguf(llama3)
    assert rebuilt is not None and rebuilt.encode("") == [0]


def test_user_defined_tokens_stay_whole_and_are_printed() -> None:
    metadata = metadata_of(trained("smollm"), "smollm")
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], USER_DEFINED]
    rebuilt = tokenizer_from_gguf(metadata)
    assert rebuilt is not None
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert last in rebuilt.encode("a<think>b")
    assert rebuilt.decode(rebuilt.encode("a<think>b"), skip_special_tokens=True) == "a<think>b"


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """A hand-made SentencePiece vocabulary: the pair whose union scores highest merges first."""
    pieces = ["▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab", "abc"]
    scores = [-9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -1.0, -4.0, -5.0]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], *pieces]
    base = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [BYTE] * 256 + [NORMAL] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return base | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def pieces_of(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))


def test_sentencepiece_by_hand() -> None:
    rebuilt = tokenizer_from_gguf(sentencepiece_metadata())
    assert rebuilt is not None
    # "bc" (-1) merges before "ab" (-2); then "▁a" (-3) before "abc" (-5).
    assert pieces_of(rebuilt, "abc") == ["<s>", "▁a", "bc"]
    # "ab" (-2) before "▁a" (-3), then "▁" + "ab" (-4).
    assert pieces_of(rebuilt, "ab a") == ["<s>", "▁ab", "▁a"]
    # What is not in the vocabulary becomes UTF-8 bytes.
    assert pieces_of(rebuilt, "aé") == ["<s>", "▁a", "<0xC3>", "<0xA9>"]
    # A leading space is a space more than the one that is always put in front.
    assert pieces_of(rebuilt, " c") == ["<s>", "▁", "▁", "c"]
    for text in ("abc ab  c", "é\n日本 a", "a", "  b"):
        assert rebuilt.decode(rebuilt.encode(text), skip_special_tokens=True) == text


def test_sentencepiece_without_a_leading_space_or_bos() -> None:
    rebuilt = tokenizer_from_gguf(
        sentencepiece_metadata(add_space_prefix=False, add_bos_token=False)
    )
    assert rebuilt is not None
    assert pieces_of(rebuilt, "abc") == ["abc"]
    assert rebuilt.decode(rebuilt.encode(" ab")) == " ab"


def test_gemma_merges_by_token_order_and_spells_spaces() -> None:
    metadata = sentencepiece_metadata() | {"general.architecture": "gemma3"}
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-1], "cba", "  "]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], USER_DEFINED]
    metadata["tokenizer.ggml.scores"] = [-1000.0] * len(metadata["tokenizer.ggml.tokens"])
    rebuilt = tokenizer_from_gguf(metadata)
    assert rebuilt is not None
    # by the scores of the test above it would be "a", "bc"
    assert pieces_of(rebuilt, "abc") == ["<s>", "ab", "c"]
    assert rebuilt.decode(rebuilt.encode("ab  c"), skip_special_tokens=True) == "ab  c"
    assert rebuilt.convert_tokens_to_ids("▁▁") == len(metadata["tokenizer.ggml.tokens"]) - 1


def test_no_tokenizer() -> None:
    assert tokenizer_from_gguf({"general.architecture": "llama"}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "bert"},
            "tokenizer.ggml.model must be one of .*, given 'bert': put the "
            "model's tokenizer.json in a folder",
        ),
        ({"pre": "viking"}, "tokenizer.ggml.pre must be one of .*, given 'viking'"),
        (
            {"tokens": None},
            "the GGUF file must state a non-empty 'tokenizer.ggml.tokens', given None",
        ),
        ({"merges": []}, "the GGUF file must state a non-empty 'tokenizer.ggml.merges'"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_from_gguf(metadata_of(trained("smollm"), "smollm", **changes))
