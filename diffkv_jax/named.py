"""Policies by name or from a file: presets, published methods and recipes."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from diffkv_jax.methods import METHODS, diffkv, quantized
from diffkv_jax.policy import CompressionPolicy
from diffkv_jax.recipes import RECIPES

PRESETS = {"quality": partial(quantized, "K8V4"), "balanced": partial(diffkv, 1.0, 0.0), "small": partial(diffkv, 1.0, 0.02)}
NAMED: Mapping[str, Callable[[], CompressionPolicy]] = PRESETS | {make.__name__: make for make in (*METHODS, *RECIPES)}


def load_policy(source: str | Path) -> CompressionPolicy:
    """A preset ("quality", "balanced", "small"), a method or recipe with its defaults ("snapkv" ...) or a JSON file of `to_json`.

    Raises:
        ValueError: neither a preset nor a readable policy file.
    """
    if str(source) in NAMED:
        return NAMED[str(source)]()
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"policy {str(source)!r} must be one of {sorted(NAMED)} or a JSON file; no such file")
    return CompressionPolicy.from_json(path.read_text())
