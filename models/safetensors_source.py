"""Hugging Face safetensors folders: one file or an index with shards, read tensor by tensor."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors relies on)
import numpy as np
from safetensors import SafetensorError, safe_open

from .folder import read_config, read_generation_config, read_json, read_tokenizer
from .names import canonical, ignored_reason
from .source import TensorInfo, check_unique, float_type, pieces, stated_type

_FLOAT_DTYPES = ("F32", "F16", "BF16")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PART = re.compile(r"^model-\d{5}-of-\d{5}\.safetensors$")


class SafetensorsSource:
    """A folder with config.json and its weights.

    model.safetensors.index.json, where there is one, says which files these are and which of them a
    tensor comes from; else they are model.safetensors and all parts
    model-00001-of-00002.safetensors, and so on.

    Opening reads the headers only. Raises ValueError for a missing config or shard, a damaged file,
    weights that are not plain floats, and a tensor that is in several files without the index
    choosing one, or missing where the index says it is.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        _check_not_quantized(folder, self.config)
        self.generation_config = read_generation_config(folder)
        weight_map = _weight_map(folder) if (folder / _INDEX).is_file() else {}
        headers = {path: _read_header(path) for path in _shard_paths(folder, weight_map)}
        self._files = _files(folder, headers, weight_map)
        self.ignored = {
            name: reason for name in self._files if (reason := ignored_reason(name)) is not None
        }
        kept = {name: canonical(name) for name in self._files if name not in self.ignored}
        check_unique(folder, kept)
        self.tensors = {kept[name]: headers[self._files[name]][name] for name in kept}
        _check_dtypes(folder, self.tensors)
        self.dtype = stated_type(self.config) or float_type(self.tensors)

    def stream(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """(name, first row, rows) shard by shard, a piece of a tensor at a time; a shard is closed
        before the next is opened.
        """
        for path in dict.fromkeys(self._files.values()):
            with _open(path) as shard:
                for name, file in self._files.items():
                    if file == path and name not in self.ignored:
                        rows = shard.get_slice(name)
                        for start, stop in pieces(tuple(rows.get_shape())):
                            yield canonical(name), start, rows[start:stop]

    def tokenizer(self) -> Any | None:
        return read_tokenizer(self.folder)


def is_safetensors_folder(folder: Path) -> bool:
    """Whether the folder holds safetensors weights under the usual names."""
    return any((folder / name).is_file() for name in (_SINGLE, _INDEX)) or bool(_numbered(folder))


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a complete safetensors file ({error}): copy or download it again"
        ) from error


def _read_header(path: Path) -> dict[str, TensorInfo]:
    with _open(path) as shard:
        views = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118  (safe_open is not a mapping)
        return {
            name: TensorInfo(tuple(view.get_shape()), str(view.get_dtype()))
            for name, view in views.items()
        }


def _weight_map(folder: Path) -> dict[str, str]:
    """The index: {tensor name: file name}."""
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{folder / _INDEX} must hold a non-empty 'weight_map': copy or download it again"
        )
    wrong = {
        name: file
        for name, file in weight_map.items()
        if not isinstance(file, str) or Path(file).name != file
    }
    if wrong:
        raise ValueError(
            f"{folder / _INDEX} must give the name of a file beside it for every tensor, given "
            f"{wrong}: correct it"
        )
    return weight_map


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("model-*.safetensors") if _PART.match(path.name))


def _shard_paths(folder: Path, weight_map: dict[str, str]) -> list[Path]:
    """The files to read: those of the index, else all that have the usual names."""
    if weight_map:
        paths, source = [folder / name for name in sorted(set(weight_map.values()))], _INDEX
    else:
        numbered, source = _numbered(folder), "their own names"
        counts = {int(path.stem.rsplit("-of-", 1)[1]) for path in numbered}
        parts = [
            folder / f"model-{i:05d}-of-{count:05d}.safetensors"
            for count in sorted(counts)
            for i in range(1, count + 1)
        ]
        single = [folder / _SINGLE] if (folder / _SINGLE).is_file() or not parts else []
        paths = [*single, *parts]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{folder} must hold every shard named in {source}, missing {missing}: copy or "
            "download them again"
        )
    return paths


def _files(
    folder: Path, headers: dict[Path, dict[str, TensorInfo]], weight_map: dict[str, str]
) -> dict[str, Path]:
    """{tensor name: the file to read it from}, file by file."""
    holders: dict[str, list[Path]] = {}
    for path, header in headers.items():
        for name in header:
            holders.setdefault(name, []).append(path)
    absent = sorted(set(weight_map) - set(holders))
    if absent:
        raise ValueError(
            f"{folder}: the shards must hold every tensor named in {_INDEX}, missing {absent}: "
            "download the folder again"
        )
    chosen = {
        name: folder / weight_map[name] if name in weight_map else paths[0]
        for name, paths in holders.items()
    }
    elsewhere = [
        f"{name} in {chosen[name].name} (it is in {_names(paths)})"
        for name, paths in holders.items()
        if chosen[name] not in paths
    ]
    if elsewhere:
        raise ValueError(
            f"{folder}: {_INDEX} names tensors that their file lacks: {'; '.join(elsewhere)}: "
            "correct the index"
        )
    twice = [
        f"{name} in {_names(paths)}"
        for name, paths in holders.items()
        if len(paths) > 1 and name not in weight_map
    ]
    if twice:
        raise ValueError(
            f"{folder}: every tensor must be in one file, or {_INDEX} must say which counts, given "
            f"{'; '.join(twice)}: remove the file that is not the model's, or write the index"
        )
    return {name: path for path in headers for name in headers[path] if chosen[name] == path}


def _names(paths: list[Path]) -> str:
    return " and ".join(path.name for path in paths)


def _check_not_quantized(folder: Path, config: dict[str, Any]) -> None:
    if quantization := config.get("quantization_config"):
        method = (
            quantization.get("quant_method", "unknown")
            if isinstance(quantization, dict)
            else quantization
        )
        raise ValueError(
            f"{folder} holds weights quantized with {method!r}, but safetensors weights must be "
            "float32, float16 or bfloat16: use the unquantized checkpoint or a GGUF file"
        )


def _check_dtypes(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    wrong = {name: info.dtype for name, info in tensors.items() if info.dtype not in _FLOAT_DTYPES}
    if wrong:
        raise ValueError(
            f"{folder}: every tensor must have one of the dtypes {_FLOAT_DTYPES}, given {wrong}: "
            "use the unquantized checkpoint or a GGUF file"
        )
