"""GGUF models in several files, written by gguf's own writer."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffkv_jax.models import load_pretrained
from diffkv_jax.models.load import convert_pretrained
from helpers_model import (
    gguf_metadata,
    gguf_tensors,
    same_trees,
    tiny_config,
    tiny_tensors,
    write_gguf,
    write_model_gguf,
)

pytest.importorskip("gguf")

CONFIG = tiny_config("llama")
TENSORS = tiny_tensors(CONFIG)


def split(folder: Path, tensors: dict[str, np.ndarray] | None = None, **options: Any) -> list[Path]:
    """The tiny Llama in parts of 8 tensors, under the names that the writer gives them."""
    folder.mkdir()
    stored = gguf_tensors(CONFIG, TENSORS) if tensors is None else tensors
    options = {"split_max_tensors": 8, **options}
    write_gguf(folder / "m.gguf", "llama", gguf_metadata(CONFIG), stored, **options)
    return sorted(folder.iterdir())


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return split(tmp_path / "parts")


def test_every_part_stands_for_the_model(tmp_path: Path, parts: list[Path]) -> None:
    whole = load_pretrained(write_model_gguf(tmp_path / "whole.gguf", CONFIG, TENSORS))
    assert [path.name for path in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in parts:
        loaded = load_pretrained(path)
        assert loaded.model == whole.model and same_trees(loaded.params, whole.params)
    convert_pretrained(parts[1], tmp_path / "out")
    assert same_trees(load_pretrained(tmp_path / "out").params, whole.params)
    name = "output_norm.weight"
    other = gguf_tensors(CONFIG, TENSORS) | {name: np.full(CONFIG["hidden_size"], 3, np.float32)}
    changed = load_pretrained(split(tmp_path / "changed", other)[0])
    assert not same_trees(changed.params, whole.params)  # the comparison can fail


def test_a_first_part_of_metadata_only(tmp_path: Path) -> None:
    parts = split(tmp_path / "parts", small_first_shard=True)
    whole = load_pretrained(write_model_gguf(tmp_path / "whole.gguf", CONFIG, TENSORS))
    for path in (parts[0], parts[-1]):
        assert same_trees(load_pretrained(path).params, whole.params)


def test_one_part_of_one(tmp_path: Path) -> None:
    keys = {"split__count": 1, "split__no": 0, "split__tensors__count": len(TENSORS)}
    load_pretrained(write_model_gguf(tmp_path / "a.gguf", CONFIG, TENSORS, **keys))
    keys["split__tensors__count"] += 1
    path = write_model_gguf(tmp_path / "b.gguf", CONFIG, TENSORS, **keys)
    with pytest.raises(ValueError, match=f"b.gguf holds {len(TENSORS)} tensors, .*count="):
        load_pretrained(path)


@pytest.mark.parametrize("given", [0, 1])
def test_missing_part(parts: list[Path], given: int) -> None:
    parts[2].unlink()
    with pytest.raises(
        ValueError,
        match=f"{parts[given].name} is one part of 3, which must all be beside it, missing "
        "m-00003-of-00003.gguf: copy or download them again, or join them with `llama-gguf-split",
    ):
        load_pretrained(parts[given])


def test_many_missing_parts(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-60000.gguf"
    write_model_gguf(path, CONFIG, TENSORS, split__count=60000, split__no=0)
    with pytest.raises(ValueError, match="m-00004-of-60000.gguf and 59996 more: copy or download"):
        load_pretrained(path)


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00003.gguf.1", "m-00003-of-00003.gguf"])
def test_another_name(parts: list[Path], name: str) -> None:
    moved = parts[1].rename(parts[1].with_name(name))
    with pytest.raises(
        ValueError,
        match=f"{name} is part 2 of 3 and must be named ...-00002-of-00003.gguf, .*: give the "
        "parts their names back, or join them",
    ):
        load_pretrained(moved)


def test_parts_that_are_others(tmp_path: Path, parts: list[Path]) -> None:
    shutil.copy(parts[2], parts[1])
    with pytest.raises(
        ValueError,
        match="m-00002-of-00003.gguf must be part 2 of 3, but says that it is part 3 of 3: copy",
    ):
        load_pretrained(parts[0])
    write_model_gguf(parts[1], CONFIG, TENSORS)
    with pytest.raises(ValueError, match="must be part 2 of 3, but says that it is part 1 of 1"):
        load_pretrained(parts[0])


def test_parts_of_two_models(tmp_path: Path, parts: list[Path]) -> None:
    count, tensors = len(TENSORS), gguf_tensors(CONFIG, TENSORS)
    longer = tensors | {"extra.weight": np.zeros(4, np.float32)}
    shutil.copy(split(tmp_path / "longer", longer)[1], parts[1])
    with pytest.raises(
        ValueError,
        match="m-00002-of-00003.gguf and m-00001-of-00003.gguf must be parts of one model, but "
        f"they say split.tensors.count={count + 1} and {count}: copy",
    ):
        load_pretrained(parts[0])
    turned = dict(reversed(tensors.items()))
    shutil.copy(split(tmp_path / "turned", turned)[1], parts[1])
    with pytest.raises(ValueError, match="must be in one part, but several parts hold .*: copy"):
        load_pretrained(parts[0])


def test_a_damaged_part(parts: list[Path]) -> None:
    parts[1].write_bytes(parts[1].read_bytes()[:-400])
    with pytest.raises(ValueError, match="m-00002-of-00003.gguf must be a complete GGUF file"):
        load_pretrained(parts[0])


@pytest.mark.parametrize("value", ["3", 3.0, [3], True])
def test_a_count_that_is_none(tmp_path: Path, value: Any) -> None:
    path = write_model_gguf(tmp_path / "a.gguf", CONFIG, TENSORS, split__count=value)
    with pytest.raises(ValueError, match="split.count=.* must be an integer of at least 0"):
        load_pretrained(path)
