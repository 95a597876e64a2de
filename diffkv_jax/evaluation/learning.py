"""The calibration of policies that learn, from a text."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np

from diffkv_jax.calibration.calibrate import calibrate
from diffkv_jax.calibration.calibration import Calibration
from diffkv_jax.calibration.usual import with_usual
from diffkv_jax.choice.automatic import chosen
from diffkv_jax.evaluation.answers import encoded
from diffkv_jax.evaluation.policies import Given
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy

SEQUENCES, LENGTH = 8, 512  # tokens of the text that are learned from, at most


def learns(policy: CompressionPolicy) -> bool:
    """Whether its codecs or its transform need a calibration."""
    return policy.transform.learned or any(fmt.learned for fmt in policy.formats("bfloat16"))


def learned(
    model: CausalLM, params: Any, tokenizer: Any, policy: CompressionPolicy, text: str | None
) -> Calibration | None:
    """What the policy learns from the beginning of `text`; None where it learns nothing, or where
    the built-in text is to do.

    Raises:
        ValueError: the text is too short.
    """
    policy = with_usual(policy, model.attention)
    if text is None or not learns(policy):
        return None
    # up to twelve characters a token are tokenised, not the whole of a long text
    ids = encoded(tokenizer, text[: 12 * SEQUENCES * LENGTH])
    length = min(LENGTH, len(ids), model.attention.max_position_embeddings)
    rows = min(SEQUENCES, len(ids) // max(length, 1))
    if length < 32:
        raise ValueError(
            f"policy {policy.name!r} learns from a text of at least 32 tokens, given {len(ids)}: "
            "give a longer one"
        )
    tokens = np.array(ids[: rows * length]).reshape(rows, length)
    return calibrate(model, params, tokens, policy, progress=sys.stderr.isatty())


def settled(
    name: str, policy: Given, loaded: Any, text: str | None, context: int
) -> tuple[CompressionPolicy, Calibration | None]:
    """A policy under its `name`, fitted to the model for `context` tokens where that is asked for,
    and what it has learned.

    Raises:
        ValueError: nothing meets what is asked for; the text is too short.
    """
    given = loaded.model, loaded.params
    if isinstance(policy, CompressionPolicy):
        return policy, learned(*given, loaded.tokenizer, policy, text)
    choice = chosen(*given, policy, context=context)
    return replace(choice.policy, name=name), choice.calibration
