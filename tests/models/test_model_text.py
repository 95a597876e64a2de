"""`load_pretrained` gives models with a tokenizer the built-in calibration text."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from diffkv_jax.models import load
from helpers_model import tiny_config, tiny_tensors, write_folder

pytest.importorskip("safetensors")
CONFIG = tiny_config("llama")


def test_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "model", CONFIG, tiny_tensors(CONFIG))
    assert load.load_pretrained(path).model.text is None  # there is no tokenizer
    ids = []

    class Reads:
        bos_token_id = 1

        def __call__(self, text: str, **_) -> SimpleNamespace:
            return SimpleNamespace(input_ids=ids)

    monkeypatch.setattr(load, "_tokenizer", lambda *_: Reads())
    ids[:] = [5, CONFIG["vocab_size"]]  # the model does not have the last
    assert load.load_pretrained(path).model.text is None
    ids[:] = [5, CONFIG["vocab_size"] - 1]
    loaded = load.load_pretrained(path)
    assert loaded.model.text.ids.tolist() == ids
