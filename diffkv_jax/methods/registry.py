"""Policies by name or from a file: published methods and recipes."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from diffkv_jax.arguments import WrongType, file_path, nearest, refuse, shown
from diffkv_jax.methods import METHODS
from diffkv_jax.methods.recipes import RECIPES
from diffkv_jax.policy.policy import CompressionPolicy

PRESETS = {"quality": 0.003, "balanced": 0.01, "small": 0.03}  # targets of the mean KL, nats
AUTO = "auto"
FITTED = (AUTO, *PRESETS)
NAMED: Mapping[str, Callable[[], CompressionPolicy]] = {
    "none": CompressionPolicy.none,
    **{make.__name__: make for make in (*METHODS, *RECIPES)},
}

Source = (
    str | PathLike[str] | CompressionPolicy | Callable[[], CompressionPolicy] | Mapping[str, Any]
)


def load_policy(source: Source) -> CompressionPolicy:
    """ "none", a method or recipe with its defaults ("snapkv" ...) or a JSON file of `to_json`.

    A policy is returned as it is, a method itself (`diffkv_jax.snapkv`) called, and a mapping is
    read as JSON's.

    Raises:
        TypeError: it is none of these.
        ValueError: neither a name nor a readable policy file, or one that is fitted to a model.
    """
    if isinstance(source, CompressionPolicy):
        return source
    if isinstance(source, Mapping):
        return CompressionPolicy.from_mapping(source)
    if callable(source) and any(source == make for make in NAMED.values()):
        return source()
    if isinstance(source, str) and source in FITTED:
        raise ValueError(
            f"policy={source!r} is fitted to a model, by generate and teacher_forced alone: "
            "elsewhere take what fit_policy(model, params) returns, or its .policy and .calibration"
        )
    if isinstance(source, str | PathLike):
        return NAMED[str(source)]() if str(source) in NAMED else _from_file(source)
    rule = f"a CompressionPolicy, a mapping of its fields, one of {sorted(NAMED)}, or a JSON file"
    raise WrongType(
        f"policy={shown(source)} must be "
        f"{rule}{'; call it with its arguments' if callable(source) else ''}"
    )


def _from_file(source: str | PathLike[str]) -> CompressionPolicy:
    path: Path = file_path("policy", source)
    if path.exists() and not path.is_file():
        refuse(
            "policy", str(source), "a JSON file that to_json wrote, and this is a folder or device"
        )
    if not path.exists():
        like = nearest([str(source)], NAMED)
        raise ValueError(
            f"policy {shown(str(source))} must be one of {sorted(NAMED)} or a JSON "
            f"file; no such file{like}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        refuse("policy", str(source), f"a JSON file that to_json wrote ({error})")
    try:
        return CompressionPolicy.from_json(text)
    except ValueError as error:
        raise type(error)(f"policy file {shown(str(source))}: {error}") from None
