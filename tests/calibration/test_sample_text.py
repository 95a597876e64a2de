"""The built-in text, its token ids, and policies that learn from it by themselves."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.calibration import automatic
from diffkv_jax.calibration.sample_text import (
    ORDER,
    SampleText,
    built_in_rows,
    built_in_tokens,
    calibration_text,
    sample_text,
)
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.testing.texts import TEXTS, load_text
from diffkv_jax.testing.tiny import prompt, tiny_model

POLICY = dkv.quantized("K4V4", transform=dkv.even_channels(), window=16, flush=8)
SCRIPTS = {"en": "times", "python": "def ", "de": "ß", "zh": "道", "json": '": [', "fr": "é"}


class Bytes:
    """A tokenizer of bytes, with what is used of Hugging Face's."""

    bos_token_id = 256

    def __init__(self, bos: bool):
        self.bos = bos

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True):
        start = [256] * (self.bos and add_special_tokens)
        return SimpleNamespace(input_ids=[*start, *text.encode()])


def reading(count: int, context: int = 100):
    """A tiny model with a text of `count` tokens, and its parameters."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32, max_len=context)
    return model.clone(text=SampleText(prompt(count, 1), prompt(0))), params


@pytest.fixture
def fits(monkeypatch, tmp_path):
    """The policies that were calibrated, in a folder and a process of their own."""
    made, real = [], automatic.calibrate

    def counted(*args, policy, **options):
        made.append(policy)
        return real(*args, policy=policy, **options)

    monkeypatch.setattr(automatic, "calibrate", counted)
    monkeypatch.setattr(automatic, "cache_directory", lambda: tmp_path)
    automatic._known.clear()
    yield made
    automatic._known.clear()


def test_the_text():
    text = calibration_text()
    assert 30_000 < len(text) < 60_000
    assert len(ORDER) == 18
    for language, mark in SCRIPTS.items():
        assert mark in text[:3600], language
    for name in ("ё", "吾", "قفا", "पोथी", "¿", "ché", "barões", "#include", "<html"):
        assert name in text


def test_no_text_that_quality_is_measured_on():
    lines = [line for line in calibration_text().splitlines() if len(line) > 40]
    for name in TEXTS:
        try:
            measured = load_text(name)
        except FileNotFoundError as missing:
            pytest.skip(str(missing))
        assert not [line for line in lines if line in measured]


def test_as_a_tokenizer_reads_it():
    size = len(calibration_text().encode())
    for bos in (False, True):
        text = sample_text(Bytes(bos), 257)
        assert text.ids.shape == (size,) and text.ids.dtype == np.int32
        assert text.prefix.tolist() == [256] * bos
    assert sample_text(None, 257) is None
    assert sample_text(Bytes(True), 256) is None  # an id that the model does not know


def test_sequences_of_it():
    model, params = tiny_model(max_len=100)
    ids = np.arange(1000, dtype=np.int32)
    with_text = model.clone(text=SampleText(ids, np.asarray([7], np.int32)))
    rows = built_in_tokens(with_text, 3, 12)
    assert rows.shape == (3, 12) and (rows[:, 0] == 7).all()
    np.testing.assert_array_equal(rows[:, 1:].ravel(), ids[:33])
    assert built_in_tokens(with_text, 2, 4096).shape == (2, 100)
    with pytest.raises(ValueError, match="count=11.*length=100.*the 1000 of the built-in text"):
        built_in_tokens(with_text, 11, 100)
    with pytest.raises(ValueError, match="no calibration text.*give tokens="):
        dkv.calibrate(model, params, POLICY)


def test_models_with_another_text_share_programs():
    model, params = tiny_model()
    other = model.clone(text=SampleText(prompt(10), prompt(0)))
    assert other == model and hash(other) == hash(model) and "text" not in repr(other)
    traced = []
    run = jax.jit(lambda model, x: traced.append(model) or x, static_argnums=0)
    assert run(model, 1) == run(other, 1) and len(traced) == 1


def test_a_transform_is_fitted_once_and_kept(fits):
    model, params = reading(400)
    text = np.stack([prompt(60, seed) for seed in (5, 6)])
    own = dkv.calibrate(model, params, policy=POLICY, progress=False)
    wanted, _ = teacher_forced(model, params, text, 40, POLICY, calibration=own)
    assert not fits
    for _ in range(2):
        found, cache = teacher_forced(model, params, text, 40, POLICY)
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(cache.policy.transform.parts[0].key_mean, own.maps[0])
    assert fits == [POLICY]


def test_once_for_each_model_and_transform(fits):
    model, params = reading(400)
    centered = dkv.quantized("K4V4", transform=dkv.Centered())
    for _ in range(2):
        for policy in (POLICY, centered):
            automatic.fitted(model, params, policy)
    assert fits == [POLICY, centered]
    automatic.fitted(model, jax.tree.map(lambda x: x + 0.1, params), POLICY)
    assert fits == [POLICY, centered, POLICY]


@pytest.mark.slow
def test_generate_fits_too(fits):
    model, params = reading(400)
    own = dkv.calibrate(model, params, POLICY, progress=False)
    outs = [
        dkv.generate(model, params, [prompt(60)], policy=POLICY, max_new_tokens=8, **more)
        for more in ({}, {"calibration": own})
    ]
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)
    assert fits == [POLICY]


def test_it_is_read_back(fits, tmp_path):
    model, params = reading(400)
    first = automatic.fitted(model, params, POLICY)
    automatic._known.clear()
    again = automatic.fitted(model, params, POLICY)
    assert again is not first and len(fits) == 1
    for ours, theirs in zip(again.maps, first.maps, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    (folder,) = (tmp_path / "calibrations").iterdir()
    shutil.rmtree(folder)
    folder.mkdir()  # damaged
    automatic._known.clear()
    automatic.fitted(model, params, POLICY)
    assert len(fits) == 2


def test_a_folder_that_cannot_be_written(fits, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(automatic, "cache_directory", lambda: tmp_path / "file")
    assert automatic.fitted(*reading(400), POLICY) is not None


def test_nothing_to_learn(fits):
    model, params = reading(400)
    assert automatic.fitted(model, params, dkv.quantized("K4V4")) is None
    codecs = dkv.coupled_quantization(4, 4)
    assert automatic.fitted(model, params, codecs) is None  # which takes minutes
    with pytest.raises(ValueError, match="has learned codecs.*calibration = diffkv_jax.calibrate"):
        dkv.generate(model, params, [prompt(60)], policy=codecs, max_new_tokens=8)
    assert automatic.fitted(*tiny_model(), POLICY) is None  # no text
    assert not fits


def test_a_short_text_is_taken_whole():
    model, _ = reading(50, context=4096)
    assert built_in_rows(model, 1024).shape == (1, 50)
    assert built_in_rows(model, 20).shape == (2, 20)
    with pytest.raises(ValueError, match="no calibration text"):
        built_in_rows(tiny_model()[0], 20)
