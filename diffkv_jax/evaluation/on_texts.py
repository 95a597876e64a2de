"""`on_texts`: the divergence of a policy from the full cache on several texts, and its bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np

from diffkv_jax.arguments import integer
from diffkv_jax.cache.report import MemoryReport, memory_report
from diffkv_jax.evaluation.answers import RunOptions, encoded
from diffkv_jax.evaluation.divergence import Quality, quality
from diffkv_jax.evaluation.forcing import teacher_forced
from diffkv_jax.inputs import as_policy
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy


@dataclass(frozen=True)
class OnTexts:
    """A policy on R texts: `quality` has a row each.

    Attributes:
        policy: its name.
        quality: against the full cache.
        report: of the cache at the end.
    """

    policy: str
    quality: Quality
    report: MemoryReport

    @property
    def of_bf16(self) -> np.ndarray:
        """Allocated bytes of each text's cache as a share of a plain bfloat16 one, float64 [R]."""
        used = self.report.allocated_bytes.sum(axis=(0, 2, 3))
        rest = self.report.allocated - used.sum()  # rings of sliding windows, counters
        return (used + rest / len(used)) / self.report.bf16_bytes

    @property
    def kept(self) -> dict[str, np.ndarray]:
        """Share of the seen tokens that each head holds, float64 [layers, kv_heads], over texts: in
        each tier by its name, in the window ("recent") and in all ("held").
        """
        held = self.report.tokens.sum(axis=1)
        seen = np.maximum(held.sum(axis=-1) + self.report.dropped.sum(axis=1), 1)
        names = (*self.report.tier_names, "recent")
        found = {name: held[..., tier] / seen for tier, name in enumerate(names)}
        return {**found, "held": held.sum(axis=-1) / seen}


def text_rows(tokenizer: Any, texts: Mapping[str, str], count: int) -> np.ndarray:
    """The first `count` tokens of each text, int32 [texts, count]; `texts` are by their names.

    Raises:
        ValueError: one has fewer; says which.
    """
    rows = {name: encoded(tokenizer, text[: 12 * count])[:count] for name, text in texts.items()}
    for name, row in rows.items():
        if len(row) < count:
            raise ValueError(
                f"text {name} has {len(row)} tokens, and context, steps and the token after them "
                f"are {count}: give a longer text, or lower context or steps"
            )
    return np.array([*rows.values()], np.int32)


def on_texts(
    model: CausalLM,
    params: Any,
    tokens: np.ndarray,
    context: int,
    policy: CompressionPolicy | str | None,
    *,
    full: np.ndarray | None = None,
    **options: Unpack[RunOptions],
) -> OnTexts:
    """Feed `tokens` int [R, context + steps + 1] by `teacher_forced`, `steps` of them one at a
    time, with the policy and with the full cache, whose log-probabilities [R, steps, vocab] may be
    given (`full_cache`). Of the options the batch size is not used: texts are one batch.

    Raises:
        TypeError, ValueError: bad input, named.
    """
    policy = as_policy(policy)
    if full is None:
        full = full_cache(model, params, tokens, context, **options)
    found, cache = _fed(model, params, tokens, context, policy, options)
    measured = quality(full, found, tokens[:, context + 1 :])
    return OnTexts(policy.name, measured, memory_report(cache))


def full_cache(
    model: CausalLM, params: Any, tokens: np.ndarray, context: int, **options: Unpack[RunOptions]
) -> np.ndarray:
    """What `on_texts` compares with: log-probabilities float32 [R, steps, vocab].

    Raises:
        TypeError, ValueError: bad input, named.
    """
    given: RunOptions = {**options, "calibration": None}
    return _fed(model, params, tokens, context, CompressionPolicy.none(), given)[0]


def _fed(
    model: CausalLM,
    params: Any,
    tokens: np.ndarray,
    context: int,
    policy: CompressionPolicy,
    options: RunOptions,
) -> tuple[np.ndarray, Any]:
    kept = {name: value for name, value in options.items() if name != "batch_size"}
    context = integer("context", context, least=1)
    return teacher_forced(model, params, tokens[:, :-1], context, policy, **kept)  # pyright: ignore
