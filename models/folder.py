"""Files that stand beside weights in a checkpoint folder: JSON configs and the tokenizer."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@contextmanager
def hugging_face_packages(path: Path) -> Iterator[None]:
    """Around imports of the packages in the "hf" extra: says what to install when one is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} needs the package {error.name!r} to be read: pip install 'diffkv-jax[hf]'",
            name=error.name,
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`."""
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _object(path, pairs)
        )
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} must hold valid JSON ({error}): copy or download it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} must hold a JSON object, given a {type(value).__name__}: copy or download it "
            "again"
        )
    return value


def _object(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are given once, or each time with the same value."""
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value and value[key] != item:
            raise ValueError(
                f"{path} must say one thing for {key!r}, given {value[key]!r} and {item!r}: "
                "correct the file"
            )
        value[key] = item
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} must hold a config.json beside its weights: copy it from the model's "
            "repository"
        )
    return read_json(path)


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """The folder's generation_config.json, or None if it has none."""
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else None


def read_tokenizer(folder: Path) -> Any | None:
    """The folder's Hugging Face tokenizer, or None without its files. Never uses the network."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with hugging_face_packages(folder):
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # a broken tokenizer.json surfaces as several unrelated exception types
        raise ValueError(
            f"the tokenizer files in {folder} must load with transformers.AutoTokenizer ({error}): "
            "copy them again"
        ) from error
