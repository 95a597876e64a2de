"""Models by their name on the Hugging Face Hub, from a cache folder that is made here: the network
is never asked.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffkv_jax.models import load_pretrained
from diffkv_jax.models.load import convert_pretrained
from helpers_model import same_trees, tiny_config, tiny_tensors, write_folder

pytest.importorskip("safetensors")
hub = pytest.importorskip("huggingface_hub")
from huggingface_hub import constants, errors  # noqa: E402

NAME, FIRST, SECOND = "Owner/tiny-llama.v1", "1" * 40, "2" * 40
CONFIG = tiny_config("llama")
TENSORS = tiny_tensors(CONFIG)


def snapshot(cache: Path, commit: str, scale: float) -> Path:
    """One downloaded commit of the model, weights times `scale`."""
    folder = cache / f"models--{NAME.replace('/', '--')}"
    tensors = {name: value * scale for name, value in TENSORS.items()}
    return write_folder(folder / "snapshots" / commit, CONFIG, tensors)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds two commits, and no network."""
    cache = tmp_path / "hub"
    snapshot(cache, FIRST, 1.0)
    snapshot(cache, SECOND, 2.0)
    refs = cache / f"models--{NAME.replace('/', '--')}" / "refs"
    refs.mkdir()
    (refs / "main").write_text(FIRST)
    (refs / "v2").write_text(SECOND)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return cache


@pytest.fixture
def params(tmp_path: Path) -> list[Any]:
    """Those of the two commits."""
    folders = [
        write_folder(tmp_path / str(scale), CONFIG, {k: v * scale for k, v in TENSORS.items()})
        for scale in (1.0, 2.0)
    ]
    return [load_pretrained(folder).params for folder in folders]


def test_from_the_cache(tmp_path: Path, cache: Path, params: list[Any]) -> None:
    first, second = params
    assert not same_trees(first, second)  # the comparisons can fail
    assert same_trees(load_pretrained(NAME).params, first)
    for revision in ("v2", SECOND):
        assert same_trees(load_pretrained(NAME, revision=revision).params, second)
    convert_pretrained(NAME, tmp_path / "out", revision="v2")
    assert same_trees(load_pretrained(tmp_path / "out").params, second)


def test_a_path_wins(tmp_path: Path, cache: Path, params: list[Any]) -> None:
    write_folder(tmp_path / NAME, CONFIG, {k: v * 2.0 for k, v in TENSORS.items()})
    assert same_trees(load_pretrained(NAME).params, params[1])
    with pytest.raises(ValueError, match="is on this disk, but revision='v2' is of a name on"):
        load_pretrained(NAME, revision="v2")
    with pytest.raises(ValueError, match="is on this disk, but revision='main'"):
        convert_pretrained(tmp_path / NAME, tmp_path / "out", revision="main")


@pytest.mark.parametrize("name", ["Owner/other", "Owner/another.v2"])
def test_neither_here_nor_in_the_cache(cache: Path, name: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"'{name}' is no path here and not complete in .*hub, and the Hugging Face Hub "
        r"cannot be asked \(.*\): download it with `hf download " + name,
    ):
        load_pretrained(name)


def test_a_revision_that_is_not_cached(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"'Owner/tiny-llama.v1' \(revision='v3'\) is no path"):
        load_pretrained(NAME, revision="v3")
    with pytest.raises(TypeError, match="revision=5 must be text"):
        load_pretrained(NAME, revision=5)


@pytest.mark.parametrize(
    "path",
    ["nothing", "./a/b", "a/b/c", "/a/b", "~/a", "a/b.gguf", "a/", "größe/a", Path("Owner/other")],
)
def test_what_is_no_name(cache: Path, path: Any) -> None:
    """Neither the cache nor the network is asked."""
    with pytest.raises(ValueError, match="must be an existing file or folder, or a model's"):
        load_pretrained(path)


@pytest.mark.parametrize(
    "kind", [errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError]
)
def test_what_the_hub_does_not_give(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        error = kind.__new__(kind)  # its own __init__ wants a response of an HTTP client
        error.args = ("404 Client Error.\n\nMore about it.",)
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(
        ValueError,
        match=rf"'Owner/other' is no path here, and the Hugging Face Hub does not give it "
        rf"\({kind.__name__}: 404 Client Error.\): correct the name or the revision, or log in",
    ):
        load_pretrained("Owner/other")


def test_only_what_is_read_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(name: str, **given: Any) -> str:
        asked.update(given)
        return str(cache / "models--Owner--tiny-llama.v1" / "snapshots" / FIRST)

    monkeypatch.setattr(hub, "snapshot_download", download)
    load_pretrained(NAME)
    wanted = [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"),
        *("merges.txt", "chat_template.jinja", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model.safetensors"),
    ]
    others = [
        *("pytorch_model.bin", "model.gguf", "consolidated.safetensors", "README.md"),
        *("original/params.json", "onnx/model.onnx", "fp16/model.safetensors"),
    ]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + others, **patterns)) == wanted


def test_a_tokenizer_by_name(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the weights beside it."""
    asked: dict[str, Any] = {}

    def download(name: str, **given: Any) -> str:
        asked.update(given)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    path = write_folder(tmp_path / "model", CONFIG, TENSORS)
    with pytest.raises(ValueError, match="tokenizer='Owner/text' must be a folder with a tokenize"):
        load_pretrained(path, tokenizer="Owner/text")
    assert "*.json" in asked["allow_patterns"] and "*.safetensors" not in asked["allow_patterns"]


def test_a_repository_without_safetensors(cache: Path) -> None:
    for file in cache.rglob("*/model.safetensors"):
        file.unlink()
    with pytest.raises(
        ValueError, match="must hold safetensors weights: download another file, such as a GGUF"
    ):
        load_pretrained(NAME)


def test_offline_by_the_environment(cache: Path) -> None:
    """As users have it: HF_HOME and HF_HUB_OFFLINE, read when the package is imported."""
    code = (
        "import sys, json\n"
        "from diffkv_jax.models import load_pretrained\n"
        "params = load_pretrained(sys.argv[1], revision='v2').params\n"
        "print(json.dumps(float(params['norm']['weight'][0])))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, NAME],
        env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    expected = 2.0 * TENSORS["model.norm.weight"][0]
    assert json.loads(ran.stdout) == pytest.approx(float(expected))
