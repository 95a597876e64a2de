"""Saved checkpoints: bit-identical parameters, and the files beside them."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import convert_weights
from diffkv_jax.models import load_pretrained
from diffkv_jax.models.checkpoint import save_checkpoint
from diffkv_jax.models.load import convert_pretrained
from helpers_model import (
    FAMILIES,
    same_trees,
    tiny_config,
    tiny_tensors,
    write_folder,
)
from helpers_tokenizer import tokenizer_folder

pytest.importorskip("safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_identical(tmp_path: Path, family: str, dtype: str) -> None:
    config = tiny_config(family)
    source = write_folder(tmp_path / "source", config, tiny_tensors(config))
    convert_pretrained(source, tmp_path / "out", dtype)
    before, after = load_pretrained(source, dtype), load_pretrained(tmp_path / "out", dtype)
    assert same_trees(before.params, after.params)
    assert before.model == after.model
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_the_dtype_asked_for_wins(tmp_path: Path) -> None:
    config = tiny_config("llama")
    source = write_folder(tmp_path / "source", config, tiny_tensors(config))
    convert_pretrained(source, tmp_path / "out")
    assert same_trees(
        load_pretrained(source, "bfloat16").params,
        load_pretrained(tmp_path / "out", "bfloat16").params,
    )


def test_tokenizer_template_and_generation_config_travel(tmp_path: Path) -> None:
    config = tiny_config("llama", vocab_size=300)
    source = write_folder(tmp_path / "source", config, tiny_tensors(config))
    tokenizer_folder(source)
    generation = {"eos_token_id": [1, 2], "temperature": 0.7}
    (source / "generation_config.json").write_text(json.dumps(generation))
    convert_pretrained(source, tmp_path / "out")
    before, after = load_pretrained(source).tokenizer, load_pretrained(tmp_path / "out").tokenizer
    assert before is not None and after is not None
    for text in ("the cat sat", "naïve 日本 🙂\n\tx = 1", "<s>the</s>"):
        assert before.encode(text) == after.encode(text)
    messages = [{"role": "user", "content": "the cat"}]
    assert (
        before.apply_chat_template(messages, tokenize=False)
        == after.apply_chat_template(messages, tokenize=False)
        == "<s>the cat</s>"
    )
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation


def test_another_tokenizer_folder_can_be_named(tmp_path: Path) -> None:
    config = tiny_config("llama")
    source = write_folder(tmp_path / "source", config, tiny_tensors(config))
    tokenizer = load_pretrained(source, tokenizer=tokenizer_folder(tmp_path / "text")).tokenizer
    assert tokenizer is not None and tokenizer.eos_token == "</s>"


def test_overwrite_replaces_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    config = tiny_config("llama")
    first = write_folder(tmp_path / "first", config, tiny_tensors(config, seed=0))
    second = write_folder(tmp_path / "second", config, tiny_tensors(config, seed=1))
    out = tmp_path / "out"
    convert_pretrained(first, out)
    with pytest.raises(
        ValueError,
        match="must be empty or absent: choose another destination, or pass overwrite=True",
    ):
        convert_pretrained(second, out)
    assert same_trees(load_pretrained(out).params, load_pretrained(first).params)
    convert_pretrained(second, out, overwrite=True)
    assert same_trees(load_pretrained(out).params, load_pretrained(second).params)
    with pytest.raises(
        ValueError, match="must hold a checkpoint of this library to be overwritten"
    ):
        convert_pretrained(first, second, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "out", "second"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    config = tiny_config("llama")
    source = write_folder(tmp_path / "source", config, tiny_tensors(config))
    convert_pretrained(source, tmp_path / "out")
    with pytest.raises(TypeError):
        save_checkpoint(
            tmp_path / "out", {"a": np.zeros(3)}, {"not json": object()}, overwrite=True
        )
    assert same_trees(load_pretrained(tmp_path / "out").params, load_pretrained(source).params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_script_converts_and_refuses(tmp_path: Path) -> None:
    config = tiny_config("llama")
    source = write_folder(tmp_path / "source", config, tiny_tensors(config))
    arguments = [str(source), str(tmp_path / "out")]
    done = CliRunner().invoke(convert_weights.app, [*arguments, "--dtype", "bfloat16"])
    assert done.exit_code == 0 and f"wrote {tmp_path / 'out'}" in done.stdout
    assert same_trees(
        load_pretrained(source, "bfloat16").params,
        load_pretrained(tmp_path / "out", "bfloat16").params,
    )
    again = CliRunner().invoke(convert_weights.app, arguments)
    assert again.exit_code == 2 and "must be empty or absent" in again.stderr
