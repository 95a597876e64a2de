"""A GGUF file opened with `gguf`: metadata as Python values, tensors as numpy views. No PyTorch."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from .gguf_reader import WholeArrays


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
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.types = {
            name: GGMLQuantizationType(tensor.tensor_type).name
            for name, tensor in self._tensors.items()
        }
        self.shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        self._check_complete(len(reader.tensors))
        self._check_types()

    def read(self, name: str) -> np.ndarray:
        """The tensor `name`, float32, [out, in] for a matrix."""
        tensor = self._tensors[name]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(
            self.shapes[name]
        )

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
