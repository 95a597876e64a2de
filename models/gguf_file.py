"""A GGUF file opened with `gguf`: metadata as Python values, tensors as numpy views. No PyTorch."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from .gguf_reader import WholeArrays
from .source import pieces


def can_decode(kind: GGMLQuantizationType) -> bool:
    """Whether the installed `gguf` decodes tensors of this type, tried on one block of zeros."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


SUPPORTED_TYPES = tuple(kind.name for kind in GGMLQuantizationType if can_decode(kind))
"""Every type that the installed `gguf` package decodes."""


class _Place(NamedTuple):
    """Where a tensor's bytes begin in its file, and how they are to be read."""

    kind: GGMLQuantizationType
    offset: int


class GGUFFile:
    """Metadata and tensors of one GGUF file.

    metadata: {key: str | bool | int | float | list}.
    types: {tensor name: quantization type name}.
    shapes: {tensor name: shape, [out, in] for a matrix (the file's own order is reversed)}.

    Raises ValueError for a damaged file, a file of the other byte order (gguf decodes its tensors
    wrongly), a file that is one part of several, and an unsupported quantization type.
    """

    def __init__(self, path: Path):
        self.path = path
        reader, self.metadata = _open(path)
        if reader.byte_order != "I":
            raise ValueError(
                f"{path} must have this machine's byte order, {sys.byteorder}-endian, but has the "
                "other: convert it with `gguf-convert-endian`"
            )
        self._places = {
            tensor.name: _Place(GGMLQuantizationType(tensor.tensor_type), int(tensor.data_offset))
            for tensor in reader.tensors
        }
        self.types = {name: place.kind.name for name, place in self._places.items()}
        self.shapes = {
            tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors
        }
        self._check_complete(len(reader.tensors))
        self._check_types()

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, float32, [out, in] for a matrix."""
        values = np.empty(self.shapes[name], np.float32)
        for start, rows in self.pieces(name):
            values[start : start + len(rows)] = rows
        return values

    def pieces(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 rows [n, ...]) of the tensor `name`, in order; the rows of a vector
        are its numbers.

        Raises ValueError where the file has become shorter since it was opened.
        """
        kind, offset = self._places[name]
        shape = self.shapes[name]
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        with self.path.open("rb") as file:
            file.seek(offset)
            for start, stop in pieces(shape):
                size = (stop - start) * math.prod(shape[1:]) // per_block * block_bytes
                stored = np.fromfile(file, np.uint8, size)
                if stored.size != size:
                    raise ValueError(f"{self.path} ends within {name!r}: copy or download it again")
                yield start, dequantize(stored[None], kind).reshape(stop - start, *shape[1:])

    def _check_complete(self, num_tensors: int) -> None:
        if self.metadata.get("split.count", 0) > 1:
            raise ValueError(
                f"{self.path} is part {self.metadata.get('split.no', 0) + 1} of "
                f"{self.metadata['split.count']}, but the file must hold the whole model: join the "
                "parts with `llama-gguf-split --merge`"
            )
        if num_tensors == 0:
            raise ValueError(
                f"{self.path} must hold a model's tensors, but it holds metadata only: use the "
                "model's own file"
            )
        if (stated := self.metadata.get("split.tensors.count", num_tensors)) != num_tensors:
            raise ValueError(
                f"{self.path} holds {num_tensors} tensors, but split.tensors.count={stated}: join "
                "all parts with `llama-gguf-split --merge`"
            )

    def _check_types(self) -> None:
        wrong = sorted({kind for kind in self.types.values() if kind not in SUPPORTED_TYPES})
        if wrong:
            names = [name for name, kind in self.types.items() if kind in wrong]
            raise ValueError(
                f"{self.path}: every tensor must have one of the types {SUPPORTED_TYPES}, which "
                f"the installed gguf package decodes, given {wrong} in {names}: use another "
                "quantization of the same model"
            )


def _open(path: Path) -> tuple[WholeArrays, dict[str, Any]]:
    """The reader and the metadata."""
    try:
        reader = WholeArrays(str(path))
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:
        # the reader meets a damaged file as IndexError, ValueError, KeyError, UnicodeDecodeError,
        # ...
        if "GGMLQuantizationType" in str(error):
            raise ValueError(
                f"{path} has a tensor of a type that the installed gguf package does not know "
                f"({error}): upgrade it with `pip install -U gguf`, or use another quantization of "
                "the same model"
            ) from error
        raise ValueError(
            f"{path} must be a complete GGUF file ({type(error).__name__}: {error}): copy or "
            "download it again"
        ) from error
    return reader, metadata
