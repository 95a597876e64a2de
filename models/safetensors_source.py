"""Hugging Face safetensors folders: one file or an index with shards, read tensor by tensor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors relies on)
import numpy as np
from safetensors import SafetensorError, safe_open

from .folder import read_config, read_generation_config, read_json, read_tokenizer
from .names import canonical, ignored_reason
from .source import TensorInfo

_FLOAT_DTYPES = ("F32", "F16", "BF16")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class SafetensorsSource:
    """A folder with config.json and model.safetensors, or model.safetensors.index.json and its shards.

    Opening reads the headers only. Raises ValueError for a missing config or shard, a damaged file, and weights that are not plain floats.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        _check_not_quantized(folder, self.config)
        self.generation_config = read_generation_config(folder)
        self._shards = {path: _read_header(path) for path in _shard_paths(folder)}
        stored = {name: info for header in self._shards.values() for name, info in header.items()}
        _check_index(folder, stored)
        self.ignored = {name: reason for name in stored if (reason := ignored_reason(name)) is not None}
        self.tensors = {canonical(name): info for name, info in stored.items() if name not in self.ignored}
        _check_dtypes(folder, self.tensors)

    def stream(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, array) shard by shard; a shard is closed before the next is opened."""
        for path, header in self._shards.items():
            with _open(path) as shard:
                for name in header:
                    if name not in self.ignored:
                        yield canonical(name), shard.get_tensor(name)

    def tokenizer(self) -> Any | None:
        return read_tokenizer(self.folder)


def is_safetensors_folder(folder: Path) -> bool:
    """Whether the folder holds safetensors weights under the usual names."""
    return (folder / _SINGLE).is_file() or (folder / _INDEX).is_file()


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a complete safetensors file ({error}): copy or download it again") from error


def _read_header(path: Path) -> dict[str, TensorInfo]:
    with _open(path) as shard:
        views = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118  (safe_open is not a mapping)
        return {name: TensorInfo(tuple(view.get_shape()), str(view.get_dtype())) for name, view in views.items()}


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / _INDEX} must hold a non-empty 'weight_map': copy or download it again")
    return weight_map


def _shard_paths(folder: Path) -> list[Path]:
    if not (folder / _INDEX).is_file():
        return [folder / _SINGLE]
    paths = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} must hold every shard named in {_INDEX}, missing {missing}: copy or download them again")
    return paths


def _check_index(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    if not (folder / _INDEX).is_file():
        return
    absent = sorted(set(_weight_map(folder)) - set(tensors))
    if absent:
        raise ValueError(f"{folder}: the shards must hold every tensor named in {_INDEX}, missing {absent}: download the folder again")


def _check_not_quantized(folder: Path, config: dict[str, Any]) -> None:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"{folder} holds weights quantized with {method!r}, but safetensors weights must be float32, float16 or bfloat16: "
            "use the unquantized checkpoint or a GGUF file"
        )


def _check_dtypes(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    wrong = {name: info.dtype for name, info in tensors.items() if info.dtype not in _FLOAT_DTYPES}
    if wrong:
        raise ValueError(
            f"{folder}: every tensor must have one of the dtypes {_FLOAT_DTYPES}, given {wrong}: "
            "use the unquantized checkpoint or a GGUF file"
        )
