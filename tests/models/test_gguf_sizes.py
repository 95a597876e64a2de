"""Sizes and tensors of GGUF files that contradict each other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import CONFIG, TENSORS, file_with

from diffkv_jax.models import load_pretrained
from helpers_model import gguf_metadata, gguf_tensors, write_gguf, write_model_gguf

pytest.importorskip("gguf")


@pytest.mark.parametrize(
    ("drop", "keys", "message"),
    [
        (
            "attention.key_length",
            {"attention__head_count": 3},
            "llama.embedding_length=64 must be a multiple of llama.attention.head_count=3",
        ),
        (
            "attention.key_length",
            {"attention__value_length": 8},
            "llama.attention.value_length=8 is not supported, it must be 16",
        ),
        (None, {"attention__head_count": 8}, "self_attn.q_proj.weight .64, 64., must be .128, 64."),
        (
            None,
            {"attention__head_count_kv": 3},
            "num_attention_heads=4 must be a multiple of num_key_value_heads=3",
        ),
        (
            None,
            {"attention__head_count": 0},
            "llama.attention.head_count=0 must be an integer of at least 1",
        ),
        (
            None,
            {"attention__head_count": 8, "attention__key_length": 8},
            "attention.value_length=16 is not supported, it must be 8",
        ),
        (None, {"embedding_length": 32}, "model.embed_tokens.weight .160, 64., must be .160, 32."),
        (
            None,
            {"block_count": 2},
            "parameters that no tensor fills: model.layers.1.input_layernorm.weight",
        ),
        (
            None,
            {"attention__head_count_kv": [2, 4]},
            "num_key_value_heads must be the same in every layer, given .2, 4.",
        ),
    ],
)
def test_sizes_that_contradict(
    tmp_path: Path, drop: str | None, keys: dict[str, Any], message: str
) -> None:
    metadata = gguf_metadata(CONFIG) | {
        f"llama.{key.replace('__', '.')}": value for key, value in keys.items()
    }
    if drop is not None:
        del metadata[f"llama.{drop}"]
    path = write_gguf(tmp_path / "a.gguf", "llama", metadata, gguf_tensors(CONFIG, TENSORS))
    with pytest.raises(ValueError, match=message):
        load_pretrained(path)


def test_one_value_for_all_layers_may_be_a_list(tmp_path: Path) -> None:
    path = file_with(tmp_path / "a.gguf", {"attention__head_count_kv": [2, 2]})
    assert load_pretrained(path).model.config.num_key_value_heads == 2


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(CONFIG["vocab_size"] + 1)]
    path = write_model_gguf(tmp_path / "a.gguf", CONFIG, TENSORS, tokenizer__ggml__tokens=tokens)
    with pytest.raises(
        ValueError,
        match="tokenizer.ggml.tokens has 161 entries, and token_embd.weight only 160 rows",
    ):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias"),
        ("output.bias", "lm_head.bias"),
        ("blk.0.rope_freqs.weight", "blk.0.rope_freqs.weight"),
        ("rope_factors_long.weight", "rope_factors_long.weight"),
        ("blk.0.attn_q_norm.weight", "model.layers.0.self_attn.q_norm.weight"),
    ],
)
def test_tensors_without_a_place(tmp_path: Path, name: str, message: str) -> None:
    tensors = gguf_tensors(CONFIG, TENSORS) | {name: np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "a.gguf", "llama", gguf_metadata(CONFIG), tensors)
    with pytest.raises(ValueError, match=f"tensors that no parameter uses: {message}"):
        load_pretrained(path)
