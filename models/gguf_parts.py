"""The files of a GGUF model: one, or all parts of a split one beside the part that is given."""

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGMLQuantizationType

from .gguf_reader import WholeArrays

_NAME = re.compile(r"(?P<model>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_OF_ITS_OWN = ("split.no", "GGUF.")
_COPY = "copy or download them again, or join them with `llama-gguf-split --merge`"


class Tensor(NamedTuple):
    """Where a tensor's bytes are, and how they are to be read; shape [out, in] for a matrix."""

    path: Path
    offset: int
    kind: GGMLQuantizationType
    shape: tuple[int, ...]


class Part(NamedTuple):
    """What the header of one file says."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def open_parts(path: Path) -> list[Part]:
    """The file `path`, or all parts of the model of which it is one, in order.

    Parts are named as llama.cpp names them, model-00001-of-00003.gguf, and number themselves. Only
    the first one has to hold the model's metadata.

    Raises ValueError for a damaged file, a missing part, and parts that are not of one model.
    """
    given = _open(path)
    count = _number(given, "split.count", 1)
    if count < 2:
        return [given]
    paths = _paths(given, count)
    missing = [other.name for other in paths if not other.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{path} is one part of {count}, which must all be beside it, missing "
            f"{', '.join(missing[:3])}{more}: {_COPY}"
        )
    parts = [given if other == path else _open(other) for other in paths]
    for number, part in enumerate(parts):
        _check_agreement(parts[0], part, number, count)
    return parts


def _paths(given: Part, count: int) -> list[Path]:
    """The names of all parts, from that of one."""
    number, name = _number(given, "split.no", 0), _NAME.fullmatch(given.path.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        raise ValueError(
            f"{given.path} is part {number + 1} of {count} and must be named "
            f"...-{number + 1:05d}-of-{count:05d}.gguf, as the other parts, which are looked for "
            "beside it: give the parts their names back, or join them with "
            "`llama-gguf-split --merge`"
        )
    return [
        given.path.with_name(f"{name['model']}-{i:05d}-of-{count:05d}.gguf")
        for i in range(1, count + 1)
    ]


def _check_agreement(first: Part, part: Part, number: int, count: int) -> None:
    """Raise ValueError where a part is not the one that its name says, or of another model."""
    stated = _number(part, "split.no", 0), _number(part, "split.count", 1)
    if stated != (number, count):
        raise ValueError(
            f"{part.path} must be part {number + 1} of {count}, but says that it is part "
            f"{stated[0] + 1} of {stated[1]}: {_COPY}"
        )
    different = [
        f"{key}={value!r} and {first.metadata[key]!r}"
        for key, value in part.metadata.items()
        if not key.startswith(_OF_ITS_OWN)
        and key in first.metadata
        and first.metadata[key] != value
    ]
    if different:
        raise ValueError(
            f"{part.path} and {first.path.name} must be parts of one model, but they say "
            f"{_shortened('; '.join(different))}: {_COPY}"
        )


def _shortened(text: str) -> str:
    return text if len(text) < 300 else f"{text[:300]} ..."


def _number(part: Part, key: str, default: int) -> int:
    value = part.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise ValueError(f"{part.path}: {key}={value!r} must be an integer of at least 0: {_COPY}")
    return value


def _open(path: Path) -> Part:
    """The header of one file."""
    try:
        reader = WholeArrays(str(path))
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {
            tensor.name: Tensor(
                path,
                int(tensor.data_offset),
                GGMLQuantizationType(tensor.tensor_type),
                tuple(int(n) for n in reversed(tensor.shape)),
            )
            for tensor in reader.tensors
        }
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
    if reader.byte_order != "I":
        raise ValueError(
            f"{path} must have this machine's byte order, {sys.byteorder}-endian, but has the "
            "other: convert it with `gguf-convert-endian`"
        )
    return Part(path, metadata, tensors)
