"""Rotary scaling in a GGUF file, as config.json's rope_scaling: from its keys, or from the divisors
in rope_freqs.weight.

The keys mean what llama.cpp makes of them: a missing type is linear, a missing factor is looked up
under the older key rope.scale_linear, attn_factor multiplies cosines and sines. The yarn_ keys are
those that its converter writes for the fields of config.json: yarn_beta_fast, yarn_beta_slow,
yarn_attn_factor (attention_factor), yarn_log_multiplier (mscale_all_dim, with mscale 1) and
yarn_ext_factor, whose one value in use is 1.
"""

import math
from typing import Any

import numpy as np

from .gguf_file import GGUFFile
from .gguf_keys import number
from .rope import yarn_mscale

_YARN_DEFAULTS = {
    "yarn_attn_factor": 1.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_log_multiplier": 0.0,
}


def rope_scaling(
    file: GGUFFile, arch: str, head_dim: int, two_bases: bool
) -> dict[str, Any] | None:
    """config.json's rope_scaling, or None for a plain rotary embedding; `two_bases`: layers with a
    window have another one, which is not scaled.

    Raises:
        ValueError: another type, keys that contradict each other, or a value that config.json
            cannot express.
    """
    kind = file.metadata.get(f"{arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(
            f"{file.path}: {arch}.rope.scaling.type must be 'none', 'linear' or 'yarn', given "
            f"{kind!r}: use another file of the model"
        )
    factor, attention = _factor(file, arch), number(file, f"{arch}.rope.scaling.attn_factor", 1.0)
    factor = 1.0 if kind == "none" else factor  # llama.cpp never scales then
    if kind != "yarn":
        _check_no_yarn(file, arch, kind)
    if attention != 1.0 and (kind != "yarn" or two_bases):
        why = "layers with a window would need it too"
        if kind != "yarn":
            why = "config.json has such a factor for YaRN only"
        raise _refused(
            file, arch, "attn_factor", attention, f"1 with type {kind!r} of {arch}: {why}"
        )
    if "rope_freqs.weight" in file.shapes:
        if kind == "yarn" or factor != 1.0:
            raise _refused(
                file,
                arch,
                "type",
                kind,
                "'none' beside the tensor rope_freqs.weight, which scales too",
            )
        return _from_divisors(file, arch, head_dim)
    if kind == "yarn":
        return _yarn(file, arch, factor, attention)
    return None if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _factor(file: GGUFFile, arch: str) -> float:
    """How much longer the context is; llama.cpp takes 0 for 1."""
    new, old = f"{arch}.rope.scaling.factor", f"{arch}.rope.scale_linear"
    factor, older = number(file, new, None), number(file, old, None)
    if factor is not None and older is not None and factor != older:
        raise ValueError(
            f"{file.path}: {new}={factor!r} and {old}={older!r} must agree: convert the model to "
            "GGUF again"
        )
    return (older if factor is None else factor) or 1.0


def _refused(file: GGUFFile, arch: str, name: str, value: Any, must: str) -> ValueError:
    return ValueError(
        f"{file.path}: {arch}.rope.scaling.{name}={value!r} is not supported, it must be {must}; "
        "use the model's safetensors files"
    )


def _check_no_yarn(file: GGUFFile, arch: str, kind: str) -> None:
    for name, default in {**_YARN_DEFAULTS, "yarn_ext_factor": 0.0}.items():
        value = number(file, f"{arch}.rope.scaling.{name}", default)
        if value != default and not (name == "yarn_ext_factor" and value < 0.0):  # negative: unset
            rule = f"{default!r} with rope.scaling.type {kind!r} (absent: 'linear')"
            raise _refused(file, arch, name, value, rule)


def _yarn(file: GGUFFile, arch: str, factor: float, attention: float) -> dict[str, Any] | None:
    given = {
        name: number(file, f"{arch}.rope.scaling.{name}", None)
        for name in (*_YARN_DEFAULTS, "yarn_ext_factor")
    }
    ext, stated = given["yarn_ext_factor"], given["yarn_attn_factor"]
    log = given["yarn_log_multiplier"] or 0.0
    if ext is not None and ext >= 0.0 and ext != 1.0:
        raise _refused(file, arch, "yarn_ext_factor", ext, "1 with type 'yarn'")
    if stated is not None and log:
        raise _refused(
            file,
            arch,
            "yarn_log_multiplier",
            log,
            f"absent beside yarn_attn_factor={stated!r}, which says the same",
        )
    scaling = {"rope_type": "yarn", "factor": factor}
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if given[key] is not None:
            scaling[name] = given[key]
    original = number(file, f"{arch}.rope.scaling.original_context_length", None)
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    natural = yarn_mscale(factor) / yarn_mscale(factor, log)
    if stated is not None or attention != 1.0:
        scaling["attention_factor"] = attention * (natural if stated is None else stated)
    elif log:
        scaling |= {"mscale": 1.0, "mscale_all_dim": log}
    plain = factor == 1.0 and scaling.get("attention_factor", 1.0) == 1.0
    return None if plain else scaling


def _from_divisors(file: GGUFFile, arch: str, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's scaling from its divisors; all models use 1, 4 and an 8192-token context."""
    theta = number(file, f"{arch}.rope.freq_base", 10000.0)
    shape = file.shapes["rope_freqs.weight"]
    if shape != (head_dim // 2,):
        raise ValueError(
            f"{file.path}: rope_freqs.weight must hold one divisor for each of the {head_dim // 2} "
            f"pairs of a head, given shape {shape}: convert the model to GGUF again"
        )
    divisors = file.read("rope_freqs.weight")
    if np.allclose(divisors, 1.0):
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": float(np.round(divisors.max(), 4)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": number(
            file, f"{arch}.rope.scaling.original_context_length", None
        )
        or 8192,
    }
    expected = _llama3_divisors(scaling, theta, len(divisors))
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(
            f"{file.path}: the divisors in rope_freqs.weight must be those of Llama 3 rope scaling "
            f"{scaling}, given {divisors.tolist()}: use the model's safetensors files, whose "
            "config.json states the scaling"
        )
    return scaling


def _llama3_divisors(scaling: dict[str, Any], theta: float, count: int) -> np.ndarray:
    """The divisor of each rotary frequency: 1 for short wavelengths, `factor` for long ones, a
    blend between. float64 [count].
    """
    frequencies = theta ** -(np.arange(count) / count)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / scaling["factor"] + blend)
