"""A warning, or an error, where a policy collapses on a model: its KL is measured once and kept."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffkv_jax.calibration.calibration import Calibration, fingerprint
from diffkv_jax.calibration.kept import kept_name
from diffkv_jax.calibration.sample_text import SampleText
from diffkv_jax.model import CausalLM
from diffkv_jax.pallas_kernels.native.build import cache_directory
from diffkv_jax.policy.keep import Budget, KeepAll
from diffkv_jax.policy.policy import CompressionPolicy

MOST_KL = 0.1  # nats
SWITCH = "DIFFKV_JAX_CHECK_POLICIES"  # 0: only what is strict is measured
VERSION = 1  # of the text and of how it is measured

_log = logging.getLogger("diffkv_jax")
_known: dict[str, float] = {}
_warned: set[str] = set()
_judges: list[Callable[..., float]] = []


def judges_policies(judge: Callable[..., float]) -> Callable[..., float]:
    """Name the function that measures a policy's mean KL on the built-in text. It stands above all
    that asks.
    """
    _judges[:] = [judge]
    return judge


def judge(
    model: CausalLM,
    params: Mapping[str, Any],
    policy: CompressionPolicy,
    calibration: Calibration | None,
    *,
    strict: bool | None,
    stacklevel: int,
) -> None:
    """Warn, once a process, of a policy whose mean KL on this model's built-in text is above 0.1;
    `strict` raises instead, None measures nothing. It is kept in the folder `judged` of
    $DIFFKV_JAX_CACHE. Models without the text are not judged, nor policies for one batch alone:
    with numbers for each request, or memory for all of them.

    Raises:
        ValueError: strict, and it is.
    """
    off = strict is None or (not strict and os.environ.get(SWITCH) == "0")
    plain = policy.tiers == ("full",) and isinstance(policy.keep, KeepAll)
    if off or plain or not isinstance(getattr(model, "text", None), SampleText):
        return
    if not _can_be_judged(policy, model):
        return
    key = _key(fingerprint(model, params), policy, calibration)
    if key not in _known:
        _known[key] = _read_or_measured(key, model, params, policy, calibration)
    if _known[key] <= MOST_KL or (key in _warned and not strict):
        return
    _warned.add(key)
    message = (
        f"policy {policy.name!r} has a mean KL of {_known[key]:.2f} from the full cache on this "
        f"model, and above {MOST_KL} its text goes astray: take policy='auto', the usual "
        "transform=Usual(), more bits or more tokens (inspect_model shows what the model's keys "
        "are like)"
    )
    if strict:
        raise ValueError(message)
    warnings.warn(message, UserWarning, stacklevel=stacklevel)


def _can_be_judged(policy: CompressionPolicy, model: CausalLM) -> bool:
    """Whether something is compressed, in any batch alike."""
    if isinstance(policy.keep, Budget) and policy.keep.in_bytes:
        return False
    layers = sum(window is None for window in model.attention.sliding_windows)
    if not layers:
        return False
    try:
        policy.bind(layers, 1, model.attention.num_kv_heads)
    except ValueError:  # it has more requests
        return False
    return True


def _key(model: str, policy: CompressionPolicy, calibration: Calibration | None) -> str:
    learned = calibration.digest if calibration else ""
    return kept_name(model, f"{VERSION}{replace(policy, name='any').to_json()}{learned}")


def _read_or_measured(key: str, *given: Any) -> float:
    file = cache_directory() / "judged" / f"{key}.json"
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["mean_kl"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not yet, or damaged: it is measured anew
    found = _judges[0](*given)
    try:
        _write(file, found)
    except OSError as error:
        _log.info("what the policy costs is not kept in %s: %s", file, error)
    return found


def _write(file: Path, mean_kl: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"mean_kl": mean_kl}), encoding="utf-8")
    part.replace(file)
