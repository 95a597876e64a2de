"""Which file a tensor comes from: the index of safetensors shards, files without one, and tensors
that are given twice.
"""

import json
import struct
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
    write_folder,
    write_gguf,
)

pytest.importorskip("safetensors")
from safetensors.numpy import save_file  # noqa: E402

CONFIG = tiny_config("llama", num_hidden_layers=1)
RIGHT, WRONG = tiny_tensors(CONFIG), tiny_tensors(CONFIG, seed=9)
NAMES = sorted(RIGHT)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"


def shards(
    folder: Path, index: dict[str, Any] | None, files: dict[str, dict[str, np.ndarray]]
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, tensors in files.items():
        save_file(
            {key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name
        )
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
    return folder


def halves() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return {n: RIGHT[n] for n in NAMES[:5]}, {n: RIGHT[n] for n in NAMES[5:]}


def index() -> dict[str, str]:
    return {name: FIRST if name in NAMES[:5] else SECOND for name in NAMES}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_pretrained(write_folder(tmp_path_factory.mktemp("whole"), CONFIG, RIGHT)).params


@pytest.mark.parametrize("wrong_one", [FIRST, SECOND])
def test_the_index_decides_between_two_copies(
    tmp_path: Path, expected: Any, wrong_one: str
) -> None:
    one, two = halves()
    files = {FIRST: one, SECOND: two}
    # every tensor of the other file, with other values
    stale = NAMES[5:] if wrong_one == FIRST else NAMES[:5]
    files[wrong_one] = files[wrong_one] | {name: WRONG[name] for name in stale}
    path = shards(tmp_path / "a", index(), files)
    assert same_trees(load_pretrained(path).params, expected)
    convert_pretrained(path, tmp_path / "out")
    assert same_trees(load_pretrained(tmp_path / "out").params, expected)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-00003-of-00003.safetensors", "model-00001-of-00009.safetensors"],
)
def test_files_that_the_index_does_not_name_are_not_read(
    tmp_path: Path, expected: Any, name: str
) -> None:
    one, two = halves()
    assert same_trees(
        load_pretrained(
            shards(tmp_path / "a", index(), {FIRST: one, SECOND: two, name: WRONG})
        ).params,
        expected,
    )


def test_a_tensor_that_the_index_leaves_out(tmp_path: Path, expected: Any) -> None:
    one, two = halves()
    without = {name: file for name, file in index().items() if name != NORM}
    assert same_trees(
        load_pretrained(shards(tmp_path / "a", without, {FIRST: one, SECOND: two})).params, expected
    )
    both = {FIRST: one | {NORM: WRONG[NORM]}, SECOND: two | {NORM: RIGHT[NORM]}}
    with pytest.raises(
        ValueError,
        match=f"every tensor must be in one file, .* given {NORM} in {FIRST} and {SECOND}: remove",
    ):
        load_pretrained(shards(tmp_path / "b", without, both))
    extra = {
        FIRST: one | {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)},
        SECOND: two,
    }
    with pytest.raises(
        ValueError, match="tensors that no parameter uses: model.layers.0.self_attn.q_proj.bias"
    ):
        load_pretrained(shards(tmp_path / "c", index(), extra))


def test_an_index_that_contradicts_the_files(tmp_path: Path) -> None:
    one, two = halves()
    moved = index() | {NORM: FIRST if index()[NORM] == SECOND else SECOND}
    with pytest.raises(
        ValueError,
        match=f"that their file lacks: {NORM} in {moved[NORM]} .it is in {index()[NORM]}.*correct",
    ):
        load_pretrained(shards(tmp_path / "a", moved, {FIRST: one, SECOND: two}))
    with pytest.raises(
        ValueError,
        match=rf"must hold every shard named in .*index.json, missing "
        rf"\['{SECOND}'\]",
    ):
        load_pretrained(shards(tmp_path / "b", index(), {FIRST: one}))
    with pytest.raises(
        ValueError,
        match=r"must hold every tensor named in .*index.json, missing "
        r"\['gone'\]",
    ):
        load_pretrained(
            shards(tmp_path / "c", index() | {"gone": FIRST}, {FIRST: one, SECOND: two})
        )
    with pytest.raises(
        ValueError, match="must give the name of a file beside it for every tensor, given .*'../x'"
    ):
        load_pretrained(shards(tmp_path / "d", index() | {NORM: "../x"}, {FIRST: one, SECOND: two}))


def test_an_index_that_says_two_things(tmp_path: Path) -> None:
    one, two = halves()
    path = shards(tmp_path / "a", index(), {FIRST: one | {NORM: WRONG[NORM]}, SECOND: two})
    text = (
        json.dumps({"weight_map": index()})
        .replace("{", f'{{"{NORM}": "{FIRST}", ', 2)
        .replace(f'{{"{NORM}": "{FIRST}", ', "{", 1)
    )
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ValueError, match=f"must say one thing for '{NORM}', given '{FIRST}' and '{SECOND}'"
    ):
        load_pretrained(path)
    config = json.dumps(CONFIG)[:-1] + ', "rope_theta": 7.0}'
    (path / "config.json").write_text(config)
    with pytest.raises(
        ValueError, match="config.json must say one thing for 'rope_theta', given 50000.0 and 7.0"
    ):
        load_pretrained(path)


def test_files_without_an_index(tmp_path: Path, expected: Any) -> None:
    one, two = halves()
    assert same_trees(
        load_pretrained(shards(tmp_path / "a", None, {FIRST: one, SECOND: two})).params, expected
    )
    with pytest.raises(ValueError, match=rf"missing \['{FIRST}'\]"):
        load_pretrained(shards(tmp_path / "b", None, {SECOND: two}))
    twice = {FIRST: one | {NORM: WRONG[NORM]}, SECOND: two | {NORM: RIGHT[NORM]}}
    with pytest.raises(
        ValueError,
        match=f"every tensor must be in one file, .* given {NORM} in {FIRST} and {SECOND}",
    ):
        load_pretrained(shards(tmp_path / "c", None, twice))
    with pytest.raises(ValueError, match=f"{NORM} in model.safetensors and {SECOND}"):
        load_pretrained(
            shards(
                tmp_path / "d",
                None,
                {FIRST: {}, SECOND: {NORM: WRONG[NORM]}, "model.safetensors": RIGHT},
            )
        )


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    tensors = RIGHT | {"language_model.model.norm.weight": WRONG[NORM]}
    with pytest.raises(
        ValueError,
        match="once, but holds model.norm.weight as "
        "language_model.model.norm.weight and model.norm",
    ):
        load_pretrained(write_folder(tmp_path / "a", CONFIG, tensors))


def test_a_tensor_twice_in_one_safetensors_file(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "a", CONFIG, RIGHT) / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    entry = json.dumps(
        {
            "dtype": "F32",
            "shape": [64],
            "data_offsets": [len(data) - 8 - size, len(data) - 8 - size + 256],
        }
    )
    header = data[8 : 8 + size].rstrip().decode()[:-1] + f', "{NORM}": {entry}}}'
    path.write_bytes(
        struct.pack("<Q", len(header)) + header.encode() + data[8 + size :] + WRONG[NORM].tobytes()
    )
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        load_pretrained(tmp_path / "a")


def test_a_tensor_twice_in_one_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tensors = gguf_tensors(CONFIG, RIGHT)
    metadata = gguf_metadata(CONFIG)
    other = write_gguf(
        tmp_path / "a.gguf", "llama", metadata, tensors | {"output_nor2.weight": WRONG[NORM]}
    )
    other.write_bytes(other.read_bytes().replace(b"output_nor2.weight", b"output_norm.weight"))
    with pytest.raises(ValueError, match="duplicated tensor with name output_norm.weight"):
        load_pretrained(other)
    named = write_gguf(tmp_path / "b.gguf", "llama", metadata, tensors | {NORM: WRONG[NORM]})
    with pytest.raises(
        ValueError,
        match="every tensor once, but holds model.norm.weight as "
        "model.norm.weight and output_norm.weight",
    ):
        load_pretrained(named)


def test_parts_of_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tensors, metadata = gguf_tensors(CONFIG, RIGHT), gguf_metadata(CONFIG)
    part = write_gguf(
        tmp_path / "a-00001-of-00003.gguf",
        "llama",
        metadata | {"split.count": 3, "split.no": 0},
        tensors,
    )
    with pytest.raises(ValueError, match="is one part of 3, .* missing a-00002-of-00003.gguf"):
        load_pretrained(part)
    few = write_gguf(
        tmp_path / "b.gguf",
        "llama",
        metadata | {"split.count": 1, "split.tensors.count": 99},
        tensors,
    )
    with pytest.raises(
        ValueError, match=f"holds {len(tensors)} tensors, but split.tensors.count=99"
    ):
        load_pretrained(few)
    whole = write_gguf(
        tmp_path / "c.gguf",
        "llama",
        metadata | {"split.count": 1, "split.tensors.count": len(tensors)},
        tensors,
    )
    load_pretrained(whole)


def test_two_kinds_of_weights_in_one_folder(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a", CONFIG, RIGHT)
    convert_pretrained(source, tmp_path / "out")
    (source / "model.safetensors").rename(tmp_path / "out" / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"must hold either params/ or \['model.safetensors'\], "
        r"but holds both",
    ):
        load_pretrained(tmp_path / "out")
