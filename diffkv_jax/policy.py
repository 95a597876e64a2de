"""`CompressionPolicy`: one choice per stage, as data."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffkv_jax.pallas_kernels.codecs import KVFormat

Threshold = float | tuple[Any, ...]


@dataclass(frozen=True)
class CompressionPolicy:
    """Which tier a token goes to, how each tier stores it, and when that is decided (docs/design.md 1).

    Attributes:
        name: shown in reports.
        tiers: formats of the stored tiers, most precise first, one or two: "full", "K8V4", "K4V2:2,4" (groups after the colon) ...
        alpha_high: threshold of the high tier in units of uniform attention 1/P: a number, or nested tuples that broadcast to
            [layers, requests, kv_heads]; layers counts those without a sliding window.
        alpha_low: threshold below which a token is dropped, likewise; 0 drops nothing.
        observe: how many of the last prompt queries score the prompt, "all" of them, or None: the policy does not score.
        window: number of most recent tokens that stay exact.
        flush: decode steps between two compression events; 1 is Algorithm 1 of the DiffKV paper.

    Raises:
        ValueError: the choices cannot work together; the message says why.
    """

    name: str
    tiers: tuple[str, ...]
    alpha_high: Threshold = 0.0
    alpha_low: Threshold = 0.0
    observe: int | Literal["all"] | None = None
    window: int = 64
    flush: int = 32

    def __post_init__(self):
        if isinstance(self.tiers, str) or not isinstance(self.tiers, Sequence):
            raise ValueError(f"tiers={self.tiers!r} must be a list of format names such as ['K8V4', 'K4V2']")
        object.__setattr__(self, "tiers", tuple(self.tiers))
        for field in ("alpha_high", "alpha_low"):
            object.__setattr__(self, field, _frozen(getattr(self, field)))
        _check_tiers(self.tiers)
        _check_schedule(self)
        _check_thresholds(self)

    @staticmethod
    def none(*, window: int = 64, flush: int = 32) -> "CompressionPolicy":
        """The plain cache on the same code path: every token stays, in the cache dtype."""
        return CompressionPolicy("none", ("full",), window=window, flush=flush)

    @property
    def drops(self) -> bool:
        """Whether any token can ever be dropped."""
        return bool(np.max(np.asarray(self.alpha_low)) > 0)

    def formats(self, cache_dtype: str) -> tuple[KVFormat, ...]:
        """The codecs of the stored tiers; "full" keeps `cache_dtype`."""
        return tuple(KVFormat.parse(name, cache_dtype) for name in self.tiers)

    def thresholds(self, layers: int, requests: int, kv_heads: int) -> np.ndarray:
        """(alpha_high, alpha_low) as float32 [layers, requests, kv_heads, 2].

        Raises:
            ValueError: a threshold does not broadcast to the model's layers and heads.
        """
        shape = (layers, requests, kv_heads)
        try:
            both = [np.broadcast_to(np.asarray(a, np.float32), shape) for a in (self.alpha_high, self.alpha_low)]
        except ValueError as error:
            raise ValueError(
                f"thresholds of policy {self.name!r} must broadcast to [layers, requests, kv_heads] = {shape}: {error}"
            ) from None
        return np.stack(both, axis=-1)

    def to_json(self) -> str:
        """The policy as JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "CompressionPolicy":
        """A policy from the JSON of `to_json`.

        Raises:
            ValueError: a field is unknown or missing, or its value cannot work.
        """
        data = json.loads(text)
        known = {field.name for field in dataclasses.fields(CompressionPolicy)}
        if not isinstance(data, dict) or not {"name", "tiers"} <= set(data) <= known:
            given = sorted(data) if isinstance(data, dict) else data
            raise ValueError(f"a policy must be a JSON object with 'name', 'tiers' and any of {sorted(known)}, given {given}")
        return CompressionPolicy(**data)


def diffkv(
    alpha_high: Threshold = 1.0,
    alpha_low: Threshold = 0.0,
    *,
    tiers: tuple[str, ...] = ("K8V4", "K4V2"),
    observe: int | Literal["all"] = 64,
    window: int = 64,
    flush: int = 32,
) -> CompressionPolicy:
    """DiffKV (arXiv 2412.03131): significant tokens at K8V4, less significant ones at K4V2, the rest dropped, per head and request."""
    return CompressionPolicy("diffkv", tiers, alpha_high, alpha_low, observe, window, flush)


def quantized(fmt: str, *, window: int = 64, flush: int = 32) -> CompressionPolicy:
    """Every token outside the recent window at one format, such as "K8V4"; nothing is dropped."""
    return CompressionPolicy(fmt, (fmt,), window=window, flush=flush)


def load_policy(source: str | Path) -> CompressionPolicy:
    """A preset ("quality", "balanced", "small") or a JSON file written with `to_json`.

    Raises:
        ValueError: neither a preset nor a readable policy file.
    """
    if str(source) in PRESETS:
        return PRESETS[str(source)]()
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"policy {str(source)!r} must be one of {sorted(PRESETS)} or a JSON file; no such file")
    return CompressionPolicy.from_json(path.read_text())


def _frozen(value: Any) -> Threshold:
    """Lists, tuples and arrays as nested tuples of floats."""
    array = np.asarray(value, np.float64)
    return float(array) if array.ndim == 0 else _tuples(array.tolist())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _check_tiers(tiers: tuple[str, ...]) -> None:
    formats = [KVFormat.parse(name) for name in tiers]
    if not 1 <= len(formats) <= 2:
        raise ValueError(f"tiers={tiers} must name one or two formats: a page table has two ends")
    if len(formats) == 2 and formats[1].token_bytes(128) >= formats[0].token_bytes(128):
        raise ValueError(f"tiers={tiers} must go from more to fewer bytes: {tiers[1]} is not smaller than {tiers[0]}")


def _check_schedule(policy: CompressionPolicy) -> None:
    for field in ("window", "flush"):
        value = getattr(policy, field)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{field}={value!r} must be an integer of at least 1")
    if policy.observe not in ("all", None) and not (isinstance(policy.observe, int) and policy.observe >= 1):
        raise ValueError(f"observe={policy.observe!r} must be a number of queries of at least 1, 'all' or None")


def _check_thresholds(policy: CompressionPolicy) -> None:
    high, low = np.asarray(policy.alpha_high), np.asarray(policy.alpha_low)
    for field, value in (("alpha_high", high), ("alpha_low", low)):
        if not np.all(np.isfinite(value)) or value.min() < 0:
            raise ValueError(f"{field}={getattr(policy, field)} must be finite and not negative")
    if np.any(low > high):
        raise ValueError(f"alpha_low={policy.alpha_low} must not exceed alpha_high={policy.alpha_high}: low tokens lie between the two")
    if policy.observe is None and (high.max() > 0 or len(policy.tiers) == 2):
        raise ValueError(
            f"policy {policy.name!r} needs observe=64 or 'all': thresholds and a second tier need significance, observe is None"
        )
    if len(policy.tiers) == 1 and policy.observe is not None and np.any(low != high):
        raise ValueError(
            f"alpha_high={policy.alpha_high} must equal alpha_low={policy.alpha_low} with the single tier {policy.tiers}: "
            "there is no low tier between them"
        )


PRESETS = {"quality": partial(quantized, "K8V4"), "balanced": partial(diffkv, 1.0, 0.0), "small": partial(diffkv, 1.0, 0.02)}
