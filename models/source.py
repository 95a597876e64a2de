"""What every weight file offers the loader: a config, a list of tensors, and them one by one."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class TensorInfo:
    """A tensor known from the header; shape as Hugging Face stores it, [out, in] for a matrix."""

    shape: tuple[int, ...]
    dtype: str


_PIECE = 2**17  # numbers: few calls, and what is done to them finds them in a processor's cache
_ROWS = 64  # at least: transposing writes that many numbers next to each other


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of the pieces in which a tensor is read; a vector's rows are
    its numbers, 2**17 at a time, a multiple of any quantization block.
    """
    step = max(_PIECE // max(math.prod(shape[1:]), 1), _ROWS)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


DTYPES = ("float32", "bfloat16", "float16")
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def float_type(tensors: Mapping[str, TensorInfo]) -> str:
    """The dtype that most numbers of `tensors` have; "bfloat16" where a tensor is quantized."""
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        if info.dtype not in _FLOATS:
            return "bfloat16"
        sizes[_FLOATS[info.dtype]] += math.prod(info.shape)
    return max(sizes, key=sizes.__getitem__, default="float32")


def stated_type(config: Mapping[str, Any]) -> str | None:
    """The dtype of a parsed config.json, called torch_dtype before transformers 5, or that of its
    text model; None where it states none of `DTYPES`.
    """
    for part in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            name = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(name, str) and (name := name.removeprefix("torch.")) in DTYPES:
                return name
    return None


def check_unique(origin: object, meaning: Mapping[str, str]) -> None:
    """Raise ValueError where two stored tensors mean one: {name in the file: canonical name}."""
    stored: dict[str, list[str]] = {}
    for name, canonical in meaning.items():
        stored.setdefault(canonical, []).append(name)
    twice = {canonical: names for canonical, names in stored.items() if len(names) > 1}
    if twice:
        listed = "; ".join(
            f"{canonical} as {' and '.join(sorted(names))}"
            for canonical, names in sorted(twice.items())
        )
        raise ValueError(
            f"{origin} must hold every tensor once, but holds {listed}: remove the one that is not "
            "the model's"
        )


class WeightSource(Protocol):
    """An opened weight file or folder. Names are Hugging Face tensor names; a name with no such
    form is given as the file spells it.
    """

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json, or its equivalent."""
        ...

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """The contents of generation_config.json, or its equivalent."""
        ...

    @property
    def dtype(self) -> str:
        """The weights' own dtype, one of `DTYPES`; "bfloat16" where they are quantized."""
        ...

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in the file."""
        ...

    @property
    def ignored(self) -> dict[str, str]:
        """{tensor name in the file: why it is left out}, of those that `tensors` does not list."""
        ...

    def stream(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Every tensor of `tensors` once, in the file's order, whole or some rows at a time: (name,
        first row, rows in float32, float16 or bfloat16).
        """
        ...

    def tokenizer(self) -> Any | None:
        """A Hugging Face tokenizer, or None where there are no tokenizer files."""
        ...
