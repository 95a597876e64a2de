"""Every refusal of the loader, by its message; one test a message. Those about GGUF files are in
test_gguf_errors.py.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.models import load_pretrained
from diffkv_jax.models.checkpoint import Checkpoint, save_checkpoint
from diffkv_jax.models.load import convert_pretrained
from helpers_model import tiny_config, tiny_tensors, write_folder, write_model_gguf

pytest.importorskip("safetensors")
pytest.importorskip("gguf")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = tiny_config("llama")
    return write_folder(tmp_path / "model", config, tiny_tensors(config))


def rewrite(folder: Path, **tensors: np.ndarray | None) -> Path:
    """The tiny llama with tensors replaced or added, or removed where None; "__" stands for "."."""
    config = tiny_config("llama")
    changes = {name.replace("__", "."): value for name, value in tensors.items()}
    kept = {
        name: value for name, value in (tiny_tensors(config) | changes).items() if value is not None
    }
    return write_folder(folder, config, kept)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="nothing must be an existing file or folder, or a .*: download the model first",
    ):
        load_pretrained(tmp_path / "nothing")


def test_dtype(folder: Path) -> None:
    with pytest.raises(
        ValueError, match="dtype must be one of .*, given 'int8': pass one of these strings"
    ):
        load_pretrained(folder, "int8")


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match="must hold model.safetensors, .* or params/: pass the folder that holds the weights",
    ):
        load_pretrained(tmp_path)


def test_folder_with_a_gguf_file(tmp_path: Path) -> None:
    config = tiny_config("llama")
    write_model_gguf(tmp_path / "model.gguf", config, tiny_tensors(config))
    with pytest.raises(ValueError, match=r"pass the GGUF file itself, one of \['model.gguf'\]"):
        load_pretrained(tmp_path)


def test_folder_with_pickles(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"save \['pytorch_model.bin'\] again as safetensors"):
        load_pretrained(tmp_path)


def test_a_file_that_is_not_gguf(folder: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"must start with the bytes b'GGUF', given .*: pass a "
        r"GGUF file, or the folder",
    ):
        load_pretrained(folder / "model.safetensors")


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="must hold a config.json beside its weights: copy it"):
        load_pretrained(folder)


def test_broken_config(folder: Path) -> None:
    truncate(folder / "config.json", 10)
    with pytest.raises(
        ValueError, match="config.json must hold valid JSON .*: copy or download it again"
    ):
        load_pretrained(folder)


def test_config_that_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json must hold a JSON object, given a list"):
        load_pretrained(folder)


def test_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match="the tokenizer files in .* must load with transformers.AutoTokenizer"
    ):
        load_pretrained(folder)


def test_named_tokenizer_folder_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="tokenizer=.* must be a folder with a tokenizer.json: copy"
    ):
        load_pretrained(folder, tokenizer=tmp_path)


@pytest.mark.parametrize("size", [4, 200, -7])
def test_truncated_safetensors(folder: Path, size: int) -> None:
    truncate(folder / "model.safetensors", size)
    with pytest.raises(
        ValueError,
        match="model.safetensors must be a complete safetensors file .*: copy or download it again",
    ):
        load_pretrained(folder)


def shard(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_empty_index(folder: Path) -> None:
    shard(folder, {})
    with pytest.raises(ValueError, match="index.json must hold a non-empty 'weight_map'"):
        load_pretrained(folder)


def test_missing_shard(folder: Path) -> None:
    shard(folder, {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"})
    with pytest.raises(
        ValueError,
        match=r"must hold every shard named in .*, missing "
        r"\['model-00002-of-00002.safetensors'\]",
    ):
        load_pretrained(folder)


def test_index_that_promises_more(folder: Path) -> None:
    shard(folder, {"no.such.tensor": "model.safetensors"})
    with pytest.raises(
        ValueError,
        match=r"the shards must hold every tensor named in .*, missing "
        r"\['no.such.tensor'\]",
    ):
        load_pretrained(folder)


def test_quantized_checkpoint(folder: Path) -> None:
    (folder / "config.json").write_text(
        json.dumps(tiny_config("llama", quantization_config={"quant_method": "gptq"}))
    )
    with pytest.raises(
        ValueError,
        match="holds weights quantized with 'gptq', but .*: use the unquantized checkpoint",
    ):
        load_pretrained(folder)


def test_integer_weights(folder: Path) -> None:
    rewrite(folder, lm_head__weight=np.zeros((160, 64), np.int8))
    with pytest.raises(
        ValueError,
        match=r"every tensor must have one of the dtypes .*, given "
        r"\{'lm_head.weight': 'I8'\}",
    ):
        load_pretrained(folder)


def test_everything_that_does_not_fit_is_listed(folder: Path) -> None:
    rewrite(
        folder,
        model__norm__weight=None,
        lm_head__weight=None,
        model__layers__0__extra__weight=np.zeros(3, np.float32),
        another=np.zeros(3, np.float32),
        model__layers__1__mlp__up_proj__weight=np.zeros((64, 96), np.float32),
    )
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    message = str(error.value)
    assert "tensors that no parameter uses: another, model.layers.0.extra.weight" in message
    assert "parameters that no tensor fills: lm_head.weight, model.norm.weight" in message
    assert (
        "tensors of another shape: model.layers.1.mlp.up_proj.weight (64, 96), must be (96, 64)"
        in message
    )


@pytest.mark.slow
def test_a_tied_model_with_another_head(tmp_path: Path) -> None:
    config = tiny_config("llama", tie_word_embeddings=True)
    tensors = tiny_tensors(config)
    same = tensors["model.embed_tokens.weight"]
    load_pretrained(write_folder(tmp_path / "same", config, tensors | {"lm_head.weight": same}))
    other = write_folder(tmp_path / "other", config, tensors | {"lm_head.weight": same + 1})
    with pytest.raises(
        ValueError,
        match="lm_head.weight must equal model.embed_tokens.weight "
        "because tie_word_embeddings is true",
    ):
        load_pretrained(other)


def test_not_a_number(folder: Path) -> None:
    rewrite(folder, model__norm__weight=np.full(64, np.nan, np.float32))
    with pytest.raises(ValueError, match="model.norm.weight must be finite in float32"):
        load_pretrained(folder)


def test_float16_overflow(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, model__norm__weight=np.full(64, 1e5, np.float32))
    with pytest.raises(
        ValueError, match="model.norm.weight must be finite in float16: load with dtype='bfloat16'"
    ):
        load_pretrained(folder, "float16")
    convert_pretrained(folder, tmp_path / "out")
    with pytest.raises(
        ValueError, match="norm/weight must be finite in float16: load with dtype='bfloat16'"
    ):
        load_pretrained(tmp_path / "out", "float16")


def test_converting_onto_a_file(folder: Path) -> None:
    with pytest.raises(
        ValueError,
        match="config.json must be a folder, but it is a file: choose another destination",
    ):
        convert_pretrained(folder, folder / "config.json")


def test_damaged_checkpoint(tmp_path: Path) -> None:
    # One array: after a failed read Orbax closes its event loop while other reads still run, which
    # prints warnings at random.
    value = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    save_checkpoint(tmp_path / "out", {"w": jnp.asarray(value)}, tiny_config("llama"))
    shapes = {"w": jax.ShapeDtypeStruct((64, 64), np.float32)}
    np.testing.assert_array_equal(Checkpoint(tmp_path / "out").read_params(shapes)["w"], value)
    data = max(
        (tmp_path / "out" / "params").rglob("*"),
        key=lambda path: path.stat().st_size if path.is_file() else 0,
    )
    truncate(data, data.stat().st_size // 2)
    with pytest.raises(
        ValueError, match="params must be a complete Orbax checkpoint .*: convert or copy it again"
    ):
        Checkpoint(tmp_path / "out").read_params(shapes)


def test_checkpoint_without_arrays(folder: Path, tmp_path: Path) -> None:
    convert_pretrained(folder, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "params")
    (tmp_path / "out" / "params").mkdir()
    with pytest.raises(
        ValueError, match="params must be a complete Orbax checkpoint .*: convert or copy it again"
    ):
        load_pretrained(tmp_path / "out")


def test_checkpoint_of_another_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_pretrained(folder, out)
    other = tiny_config(
        "llama", tie_word_embeddings=True, attention_bias=True, intermediate_size=32
    )
    (out / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError) as error:
        load_pretrained(out)
    message = str(error.value)
    assert "tensors that no parameter uses: lm_head/kernel" in message
    assert "layers/self_attn/q_proj/bias" in message
    assert "layers/mlp/up_proj/kernel (2, 64, 96), must be (2, 64, 32)" in message
