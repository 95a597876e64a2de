"""What every kind of weight file offers the loader: a config, a list of tensors, and the tensors one at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file, known from the header alone. shape: as Hugging Face stores it, [out, in] for a matrix."""

    shape: tuple[int, ...]
    dtype: str


class WeightSource(Protocol):
    """An opened weight file or folder. Names are Hugging Face tensor names; a name with no such form is given as the file spells it."""

    @property
    def config(self) -> dict[str, Any]:
        """The contents of config.json, or its equivalent."""
        ...

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """The contents of generation_config.json, or its equivalent."""
        ...

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in the file."""
        ...

    @property
    def ignored(self) -> dict[str, str]:
        """{tensor name as the file spells it: why it is left out}, for tensors that `tensors` does not list."""
        ...

    def stream(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor of `tensors` once, in the file's order, float32, float16 or bfloat16."""
        ...

    def tokenizer(self) -> Any | None:
        """A Hugging Face tokenizer, or None where there are no tokenizer files."""
        ...
