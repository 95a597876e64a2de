"""What a reader of results needs to know about a run: versions, hardware, date, model."""

import datetime
import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from diffkv_jax.calibration.calibration import fingerprint
from diffkv_jax.model import CausalLM

_PACKAGES = ("diffkv-jax", "jax", "jaxlib", "flax", "numpy", "transformers")


def circumstances() -> dict[str, Any]:
    """Versions, hardware and the date in UTC."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": {
            "device": device.device_kind,
            "platform": device.platform,
            "devices": jax.device_count(),
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
    }


def about_model(name: str, model: CausalLM, params: Any) -> dict[str, Any]:
    """The model's name, fingerprint, dtype, layers and heads."""
    attention = model.attention
    return {
        "name": Path(name).name if Path(name).exists() else name,
        "fingerprint": fingerprint(model, params),
        "dtype": attention.dtype,
        "layers": attention.num_layers,
        "kv_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "context": attention.max_position_embeddings,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    """The processor's name as Linux knows it, else as Python does."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
