"""How parameters are filled: in pieces, within the memory that they take themselves."""

import io
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from diffkv_jax.models import fill, load_pretrained, source
from diffkv_jax.models.load import convert_pretrained
from diffkv_jax.models.names import flatten
from helpers_model import tiny_config, tiny_tensors, write_folder, write_model_gguf

gguf = pytest.importorskip("gguf")
from diffkv_jax.models import gguf_file  # noqa: E402

WIDE = tiny_config("qwen2", hidden_size=256, intermediate_size=512, vocab_size=20_000)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_pieces_are_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, family: str
) -> None:
    """Matrices and vectors that are read a few rows at a time, the last piece shorter."""
    config = tiny_config(family)
    path = write_model_gguf(tmp_path / "a.gguf", config, tiny_tensors(config), kind)
    whole = flatten(load_pretrained(path).params)
    monkeypatch.setattr(source, "_PIECE", 7 * config["hidden_size"])
    monkeypatch.setattr(source, "_ROWS", 3)
    file = gguf_file.GGUFFile(path)
    rows = [len(part) for _, part in file.pieces("token_embd.weight")]
    assert len(rows) > 2 and sum(rows) == config["vocab_size"] and rows[-1] < rows[0]
    for name, leaf in flatten(load_pretrained(path).params).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(whole[name]))
    monkeypatch.setattr(file, "pieces", lambda name: [(0, np.zeros(file.shapes[name]))])
    assert not file.read("token_embd.weight").any()  # it is made of these


def peak(path: Path, dtype: str) -> tuple[int, int]:
    """(highest sum of what NumPy and Python held while loading, bytes of the parameters)"""
    tracemalloc.start()
    params = load_pretrained(path, dtype).params
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return highest, sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.daily(4)
@pytest.mark.parametrize("made", ["gguf", "folder"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, dtype: str
) -> None:
    """At most the parameters and the largest tensor, here the embedding in float32."""
    tensors, largest = tiny_tensors(WIDE), 20_000 * 256 * 4
    path = (
        write_model_gguf(tmp_path / "a.gguf", WIDE, tensors)
        if made == "gguf"
        else write_folder(tmp_path / "a", WIDE, tensors)
    )
    load_pretrained(path, dtype)  # imports, and programs traced once
    highest, size = peak(path, dtype)
    assert highest < size + largest
    if dtype == "bfloat16":  # a few rows at a time, so much less
        assert highest < size + largest // 8
        monkeypatch.setattr(source, "_PIECE", 2**30)  # whole, as `dequantize` would have it
        assert peak(path, dtype)[0] > size + largest


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends copy to their memory")
def test_jax_takes_the_memory_over() -> None:
    for shape in [(3,), (5, 7), (4, 100, 3)]:
        values = fill._aligned(shape, np.dtype(np.float32))
        values[...] = 1.0
        assert values.shape == shape and values.flags.c_contiguous
        assert jax.device_put(values).unsafe_buffer_pointer() == values.ctypes.data


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_all_finite(dtype: Any) -> None:
    limits = ml_dtypes.finfo(dtype)
    fine = [0.0, -0.0, 1.0, limits.max, limits.min, limits.tiny, limits.smallest_subnormal]
    assert fill.all_finite(np.array(fine, dtype))
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        assert not fill.all_finite(np.array([*fine, bad], dtype))
        assert not fill.all_finite(np.array([[bad], [1.0]], dtype))
        many = np.ones((3, fill._CHECKED // 2), dtype)
        assert fill.all_finite(many)
        many[-1, -1] = bad
        assert not fill.all_finite(many) and not fill.all_finite(many.T)


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    config = tiny_config("llama")
    path = write_model_gguf(tmp_path / "a.gguf", config, tiny_tensors(config))
    file = gguf_file.GGUFFile(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="a.gguf ends within .*: copy or download it again"):
        for name in file.shapes:
            file.read(name)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown when asked for and where standard error is a terminal."""
    config = tiny_config("llama")
    path = write_model_gguf(tmp_path / "a.gguf", config, tiny_tensors(config))
    load_pretrained(path, progress=True)
    said = capsys.readouterr().err
    assert "weights: " in said and f"/{len(tiny_tensors(config))} " in said
    load_pretrained(path)
    convert_pretrained(path, tmp_path / "out")
    load_pretrained(path, progress=False)
    assert capsys.readouterr().err == ""
    for progress, shown in ((None, True), (False, False)):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        load_pretrained(path, progress=progress)
        assert ("weights" in terminal.getvalue()) == shown
    with pytest.raises(TypeError, match="progress='yes' must be True or False"):
        load_pretrained(path, progress="yes")
