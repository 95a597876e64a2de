"""A GGUF model opened with `gguf`: metadata as Python values, tensors decoded. No PyTorch."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from .gguf_parts import open_parts
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


class GGUFFile:
    """Metadata and tensors of one GGUF file, or of all parts of a split one.

    metadata: {key: str | bool | int | float | list}, of the first part.
    types: {tensor name: quantization type name}.
    shapes: {tensor name: shape, [out, in] for a matrix (the file's own order is reversed)}.

    Raises ValueError for what `open_parts` refuses, and an unsupported quantization type.
    """

    def __init__(self, path: Path):
        self.path = path
        parts = open_parts(path)
        self.metadata = parts[0].metadata
        self._tensors = {name: at for part in parts for name, at in part.tensors.items()}
        self.types = {name: tensor.kind.name for name, tensor in self._tensors.items()}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self._check_complete(Counter(name for part in parts for name in part.tensors))
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
        path, offset, kind, shape = self._tensors[name]
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        with path.open("rb") as file:
            file.seek(offset)
            for start, stop in pieces(shape):
                size = (stop - start) * math.prod(shape[1:]) // per_block * block_bytes
                stored = np.fromfile(file, np.uint8, size)
                if stored.size != size:
                    raise ValueError(f"{path} ends within {name!r}: copy or download it again")
                yield start, dequantize(stored[None], kind).reshape(stop - start, *shape[1:])

    def _check_complete(self, found: Counter[str]) -> None:
        if twice := [name for name, times in found.items() if times > 1]:
            raise ValueError(
                f"{self.path}: every tensor must be in one part, but several parts hold {twice}: "
                "copy or download them again"
            )
        if not found:
            raise ValueError(
                f"{self.path} must hold a model's tensors, but it holds metadata only: use the "
                "model's own file"
            )
        if (stated := self.metadata.get("split.tensors.count", len(found))) != len(found):
            raise ValueError(
                f"{self.path} holds {len(found)} tensors, but split.tensors.count={stated} with "
                "all parts together: copy or download them again"
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
