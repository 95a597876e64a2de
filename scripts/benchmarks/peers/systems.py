"""Who takes part in `benchmarks peers`: one line a system, and the interface that each adapter has.

Imports nothing heavy: a worker process loads only the library that it measures, so its peak memory
is that library's own.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Decoded:
    """What one `decode` took: seconds of all its steps, and bytes of the arrays that hold keys and
    values, unused room included.
    """

    seconds: float
    kv_bytes: int


@dataclass(frozen=True)
class Place:
    """Where the model is: the GGUF file, a work folder with its converted copies
    (`weights.py`), and how many threads to use.
    """

    gguf: Path
    work: Path
    threads: int


class System(Protocol):
    """One library with one kind of KV cache. Methods are called in a process of its own, one at a
    time.
    """

    def prefill(self, tokens: np.ndarray) -> float:
        """Seconds from prompts int32 [R, N] to the first token of each on the host."""
        ...

    def keep(self, tokens: np.ndarray) -> None:
        """Have the cache of a prompt int32 [N] for `decode`, perhaps from an earlier run's file."""
        ...

    def decode(self, batch: int, steps: int) -> Decoded:
        """`steps` greedy tokens for each of `batch` requests that all start from copies of the kept
        cache; the copies are not timed.
        """
        ...

    def teacher_forced(self, tokens: np.ndarray, context: int) -> np.ndarray:
        """Prefill `tokens[:context]` of int32 [N], feed the others one by one; log-probabilities
        float32 [N - context, vocab].
        """
        ...


@dataclass(frozen=True)
class Participant:
    """One system: what the tables call it, its adapter class, the keyword arguments, and the full
    cache that it is compared with.
    """

    title: str
    adapter: str
    options: Mapping[str, Any] = field(default_factory=dict)
    counterpart: str | None = None


def _ours(title: str, counterpart: str | None = "ours-full", **options: Any) -> Participant:
    return Participant(f"diffkv_jax {title}", "benchmarks.peers.ours:Ours", options, counterpart)


def _torch(
    title: str, counterpart: str | None = "transformers-bf16", **options: Any
) -> Participant:
    return Participant(
        f"transformers {title}", "benchmarks.peers.transformers:Transformers", options, counterpart
    )


def _press(title: str, name: str) -> Participant:
    return Participant(
        f"kvpress {title} 50 %",
        "benchmarks.peers.transformers:Pressed",
        {"press": name},
        "transformers-bf16",
    )


def _llama(title: str, counterpart: str | None = "llama-f16", **options: Any) -> Participant:
    return Participant(
        f"llama.cpp {title}", "benchmarks.peers.llama:LlamaCpp", options, counterpart
    )


REFERENCE = "transformers-f32"
SYSTEMS: dict[str, Participant] = {
    "ours-full": _ours("full cache", None, policy="none"),
    "ours-k8v4": _ours("K8V4", policy="K8V4"),
    "ours-diffkv": _ours("diffkv (1, 0)", policy="diffkv", alphas=(1.0, 0.0)),
    "ours-diffkv-drop": _ours("diffkv (1, 0.02)", policy="diffkv", alphas=(1.0, 0.02)),
    "ours-full-xla": _ours("full cache, plain XLA", policy="none", implementation="xla"),
    "ours-diffkv-xla": _ours(
        "diffkv (1, 0), plain XLA", policy="diffkv", alphas=(1.0, 0.0), implementation="xla"
    ),
    "ours-full-f32": _ours("full cache, float32", None, policy="none", dtype="float32"),
    "ours-diffkv-f32": _ours(
        "diffkv (1, 0), float32",
        "ours-full-f32",
        policy="diffkv",
        alphas=(1.0, 0.0),
        dtype="float32",
    ),
    "transformers-f32": _torch("float32 DynamicCache", None, dtype="float32"),
    "transformers-bf16": _torch("bf16 DynamicCache", None),
    "transformers-static": _torch("bf16 StaticCache", cache="static"),
    "quanto-4bit": _torch("QuantizedCache quanto 4 bit", cache="quanto", bits=4),
    "quanto-2bit": _torch("QuantizedCache quanto 2 bit", cache="quanto", bits=2),
    "hqq-4bit": _torch("QuantizedCache HQQ 4 bit", cache="hqq", bits=4),
    "hqq-2bit": _torch("QuantizedCache HQQ 2 bit", cache="hqq", bits=2),
    "kvpress-snapkv": _press("SnapKV", "snapkv"),
    "kvpress-knorm": _press("Knorm", "knorm"),
    "kvpress-expected": _press("ExpectedAttention", "expected"),
    "kvpress-adakv": _press("AdaKV (SnapKV)", "adakv"),
    "llama-f16": _llama("f16 weights, KV f16", None),
    "llama-q8": _llama("f16 weights, KV q8_0", kv="q8_0"),
    "llama-q4": _llama("f16 weights, KV q4_0", kv="q4_0"),
    "llama-w4": _llama("Q4_1 weights, KV f16", None, weights="shipped"),
    "llama-w4-q8": _llama("Q4_1 weights, KV q8_0", "llama-w4", weights="shipped", kv="q8_0"),
}
OURS_BUDGET = ("ours-full", "ours-k8v4", "ours-diffkv", "ours-diffkv-drop")


def chosen(patterns: str) -> list[str]:
    """Names of SYSTEMS that match the comma-separated patterns, in the table's order.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    if missing := [
        pattern for pattern in wanted if not any(fnmatch(name, pattern) for name in SYSTEMS)
    ]:
        raise ValueError(f"--systems {','.join(missing)} matches none of {', '.join(SYSTEMS)}")
    return [name for name in SYSTEMS if any(fnmatch(name, pattern) for pattern in wanted)]


def build(one: Participant, place: Place) -> System:
    """The adapter, its library imported and its model loaded."""
    module, _, name = one.adapter.partition(":")
    return getattr(importlib.import_module(module), name)(place, **one.options)


def log_softmax(logits: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [steps, vocab] from rows of logits, in NumPy."""
    x = np.stack([np.asarray(row, np.float64) for row in logits])
    x -= x.max(axis=-1, keepdims=True)
    return (x - np.log(np.exp(x).sum(axis=-1, keepdims=True))).astype(np.float32)
