"""Safetensors folders, as numpy writes them and as `transformers` does, single and sharded."""

import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from diffkv_jax.models import load_pretrained
from diffkv_jax.models.names import flatten, slots
from helpers_model import FAMILIES, same_trees, tiny_config, tiny_tensors, write_folder

pytest.importorskip("safetensors")


def expected_leaf(tensors: dict[str, np.ndarray], path: tuple[str, ...]) -> np.ndarray:
    """A leaf assembled by hand: transposed if a kernel, stacked if in the layers."""
    leaf = "bias" if path[-1] == "bias" else "weight"
    if path[0] != "layers":
        name = ".".join(path[:-1] if path[0] == "lm_head" else ("model", *path[:-1]))
        value = tensors[f"{name}.{leaf}"]
        return value.T if path[-1] == "kernel" else value
    count = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    values = [tensors[f"model.layers.{i}.{'.'.join(path[1:-1])}.{leaf}"] for i in range(count)]
    return np.stack([value.T if path[-1] == "kernel" else value for value in values])


@pytest.mark.daily(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_lands_in_its_place(tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    tensors = tiny_tensors(config)
    model, params, tokenizer = load_pretrained(write_folder(tmp_path, config, tensors))
    leaves = flatten(params)
    assert sum(leaf.size for leaf in leaves.values()) == sum(
        value.size for value in tensors.values()
    )
    for path, leaf in leaves.items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, expected_leaf(tensors, path), err_msg="/".join(path))
    assert tokenizer is None
    assert model.attention.num_kv_heads == 2


def test_the_check_above_can_fail(tmp_path: Path) -> None:
    config = tiny_config("llama")
    tensors = tiny_tensors(config)
    params = load_pretrained(write_folder(tmp_path, config, tensors)).params
    path = ("layers", "self_attn", "o_proj", "kernel")
    first, second = (f"model.layers.{i}.self_attn.o_proj.weight" for i in (0, 1))
    swapped = tensors | {first: tensors[second], second: tensors[first]}
    untransposed = tensors | {name: tensors[name].T for name in (first, second)}
    for wrong in (swapped, untransposed):
        assert not np.array_equal(flatten(params)[path], expected_leaf(wrong, path))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)]
)
def test_dtypes(tmp_path: Path, dtype: str, numpy_dtype: Any) -> None:
    config = tiny_config("llama")
    tensors = tiny_tensors(config)
    rounded = {name: value.astype(numpy_dtype) for name, value in tensors.items()}
    wide = load_pretrained(write_folder(tmp_path / "wide", config, tensors), dtype)
    narrow = load_pretrained(write_folder(tmp_path / "narrow", config, rounded), dtype)
    assert wide.model.attention.dtype == dtype
    assert {str(leaf.dtype) for leaf in flatten(wide.params).values()} == {dtype}
    assert same_trees(wide.params, narrow.params)
    widened = load_pretrained(tmp_path / "narrow", "float32").params
    assert same_trees(widened["norm"]["weight"], rounded["model.norm.weight"].astype(np.float32))


def test_multimodal_names_and_listed_extras(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config("gemma3_text")
    tensors = tiny_tensors(config)
    plain = load_pretrained(write_folder(tmp_path / "plain", config, tensors)).params
    outer = {"model_type": "gemma3", "text_config": config, "vision_config": {}}
    for style in ("language_model.model.", "model.language_model."):
        named = {style + name.removeprefix("model."): value for name, value in tensors.items()}
        named |= {
            "vision_tower.a.position_ids": np.zeros((1, 3), np.int64),
            "multi_modal_projector.b": np.ones((2, 2), np.float32),
        }
        named["language_model.lm_head.weight"] = tensors["model.embed_tokens.weight"]
        with caplog.at_level(logging.INFO, "diffkv_jax"):
            caplog.clear()
            params = load_pretrained(
                write_folder(tmp_path / style.replace(".", "_"), outer, named)
            ).params
        assert same_trees(plain, params)
        for name in ("vision_tower.a.position_ids", "multi_modal_projector.b", "lm_head.weight"):
            assert f"ignored {name}" in caplog.text


@pytest.mark.slow
def test_the_windows_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "diffkv_jax"):
        gemma = tiny_config("gemma3_text")
        load_pretrained(write_folder(tmp_path / "gemma", gemma, tiny_tensors(gemma)))
        llama = tiny_config("llama")
        load_pretrained(write_folder(tmp_path / "llama", llama, tiny_tensors(llama)))
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert (
        "WARNING",
        "7 layers: 1 compressed, 6 keep a full-precision window of 32 tokens",
    ) in lines
    assert ("INFO", "2 layers: 2 compressed") in lines


@pytest.mark.daily(3)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_what_transformers_writes_single_and_sharded(tmp_path: Path, family: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(**tiny_config(family))
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    reference.save_pretrained(tmp_path / "single")
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    single, sharded = load_pretrained(tmp_path / "single"), load_pretrained(tmp_path / "sharded")
    assert single.model == sharded.model
    assert same_trees(single.params, sharded.params)
    state = {name: value.numpy() for name, value in reference.state_dict().items()}
    for name, slot in slots(single.params).items():
        leaf = np.asarray(flatten(single.params)[slot.path])
        leaf = leaf if slot.layer is None else leaf[slot.layer]
        np.testing.assert_array_equal(leaf.T if slot.transpose else leaf, state[name], err_msg=name)
