"""This library's own checkpoint: parameters saved with Orbax, with Hugging Face's files beside.

A checkpoint is a folder with params/ (the parameter tree, written by Orbax) and config.json, and
where the model has them generation_config.json, the tokenizer's files and chat_template.jinja.
"""

import json
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from .fill import all_finite, complain
from .folder import read_config, read_generation_config, read_tokenizer
from .names import flatten
from .source import DTYPES

_PARAMS = "params"


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` looks like something `save_checkpoint` wrote."""
    return (folder / _PARAMS).is_dir()


class Checkpoint:
    """A folder written by `save_checkpoint`. Opening reads config.json only."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_config(folder)
        self.generation_config = read_generation_config(folder)

    def tokenizer(self) -> Any | None:
        """The Hugging Face tokenizer, or None if none was saved."""
        return read_tokenizer(self.folder)

    @property
    def dtype(self) -> str:
        """The dtype that most parameters were saved in."""
        sizes: Counter[str] = Counter()
        for leaf in flatten(self._stored).values():
            sizes[np.dtype(leaf.dtype).name] += math.prod(leaf.shape)
        return max(DTYPES, key=sizes.__getitem__)

    @property
    def _path(self) -> str:
        return str((self.folder / _PARAMS).resolve())

    @cached_property
    def _stored(self) -> Any:
        """Shapes and dtypes of the saved tree."""
        try:
            return ocp.metadata(self._path).metadata
        except Exception as error:  # Orbax meets a damaged folder as many exception types
            raise _damaged(self._path, error) from error

    def read_params(self, param_shapes: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, cast to the dtypes of `param_shapes` (nested dict of
        `jax.ShapeDtypeStruct`), on the default device.

        Raises ValueError for a damaged checkpoint, and for leaves that are unused, unfilled or of
        another shape (all listed).
        """
        sharding = jnp.zeros(()).sharding
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            dict(param_shapes),
        )
        _check_complete(self._stored, abstract, str(self.folder))
        try:
            params = ocp.load(self._path, abstract)
        except Exception as error:
            raise _damaged(self._path, error) from error
        _check_finite(params, str(self.folder))
        return params


def check_destination(folder: Path, overwrite: bool) -> None:
    """Raise ValueError if `save_checkpoint` would refuse `folder`; call it before long work.

    An existing non-empty folder is replaced only with `overwrite`, and only if it holds a
    checkpoint.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, but it is a file: choose another destination")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"{folder} must be empty or absent: choose another destination, or pass overwrite=True "
            "(--overwrite)"
        )
    if not is_checkpoint(folder):
        raise ValueError(
            f"{folder} must hold a checkpoint of this library to be overwritten: choose another "
            "destination, or empty it yourself"
        )


def save_checkpoint(
    folder: str | Path,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Any | None = None,
    generation_config: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that `load_pretrained` reads.

    The folder appears under its name only when it is complete.

    Args:
        folder: where to write; an existing checkpoint there is replaced if `overwrite`.
        params: the parameter tree.
        config, generation_config: contents of the Hugging Face files of these names.
        tokenizer: a Hugging Face tokenizer.
    Raises:
        ValueError: as `check_destination` says.
    """
    folder = Path(folder).expanduser().absolute()
    check_destination(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        ocp.save(str(new / _PARAMS), dict(params))
        _write_json(new / "config.json", config)
        if generation_config is not None:
            _write_json(new / "generation_config.json", generation_config)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)
        shutil.rmtree(Path(scratch) / "old", ignore_errors=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _damaged(path: str, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [""])[0][:200]  # TensorStore appends pages of details
    return ValueError(
        f"{path} must be a complete Orbax checkpoint ({type(error).__name__}: {reason}): convert "
        "or copy it again"
    )


def _check_complete(stored: Any, wanted: Mapping[str, Any], origin: str) -> None:
    given, needed = flatten(stored), flatten(wanted)
    both = [path for path in needed if path in given]
    complain(
        origin,
        unused=["/".join(path) for path in given if path not in needed],
        unfilled=["/".join(path) for path in needed if path not in given],
        wrong=[
            f"{'/'.join(path)} {tuple(given[path].shape)}, must be {tuple(needed[path].shape)}"
            for path in both
            if tuple(given[path].shape) != tuple(needed[path].shape)
        ],
    )


def _check_finite(params: Mapping[str, Any], origin: str) -> None:
    """Only float16 can overflow on the way."""
    for path, leaf in flatten(params).items():
        if leaf.dtype == jnp.float16 and not all_finite(np.asarray(leaf)):
            raise ValueError(
                f"{origin}: {'/'.join(path)} must be finite in float16: load with dtype='bfloat16' "
                "or 'float32'"
            )
