"""dtype="auto", the default of `load_pretrained`: the weights' own dtype."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from diffkv_jax.models import load_pretrained
from diffkv_jax.models.load import convert_pretrained
from helpers_model import tiny_config, tiny_tensors, write_folder, write_model_gguf

pytest.importorskip("safetensors")
pytest.importorskip("gguf")

TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
CONFIG = tiny_config("llama")


def folder(path: Path, stored: str, norms: str | None = None, **config: Any) -> Path:
    tensors = {
        name: value.astype(TYPES[norms or stored] if value.ndim == 1 else TYPES[stored])
        for name, value in tiny_tensors(CONFIG).items()
    }
    return write_folder(path, CONFIG | config, tensors)


def loaded(path: Path, *dtype: str) -> str:
    """The dtype of the model, and of all its parameters."""
    model, params, _ = load_pretrained(path, *dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {model.dtype}
    return model.dtype


@pytest.mark.parametrize("stored", TYPES)
def test_of_the_tensors(tmp_path: Path, stored: str) -> None:
    for norms in (stored, "float32"):  # the type of most numbers
        path = folder(tmp_path / norms, stored, norms)
        assert loaded(path) == loaded(path, "auto") == stored
    assert loaded(path, "float32") == "float32"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16", "torch_dtype": "bfloat16"}, "float16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float64"}, "float32"),
        ({"dtype": 16}, "float32"),
        ({"dtype": None}, "float32"),
    ],
)
def test_as_the_config_states_it(tmp_path: Path, config: Any, expected: str) -> None:
    assert loaded(folder(tmp_path / "a", "float32", **config)) == expected


@pytest.mark.parametrize("outside", [True, False])
def test_of_a_text_model(tmp_path: Path, outside: bool) -> None:
    inner = tiny_config("gemma3_text")
    stated = {"dtype": "bfloat16"}
    config = {"model_type": "gemma3", "text_config": inner | ({} if outside else stated)}
    path = write_folder(tmp_path / "a", config | (stated if outside else {}), tiny_tensors(inner))
    assert loaded(path) == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")],
)
def test_of_a_gguf_file(tmp_path: Path, kind: str, expected: str) -> None:
    path = write_model_gguf(tmp_path / "a.gguf", CONFIG, tiny_tensors(CONFIG), kind)
    assert loaded(path) == expected


def test_of_a_converted_checkpoint(tmp_path: Path) -> None:
    """What it was saved in, whatever the config of the source says."""
    source = folder(tmp_path / "a", "float32", dtype="bfloat16")
    convert_pretrained(source, tmp_path / "auto")
    assert loaded(tmp_path / "auto") == "bfloat16"
    for dtype in TYPES:
        convert_pretrained(source, tmp_path / dtype, dtype)
        assert loaded(tmp_path / dtype) == dtype
