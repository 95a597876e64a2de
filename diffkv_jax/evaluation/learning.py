"""The calibration of policies that learn, from a text."""

import sys
from typing import Any

import numpy as np

from diffkv_jax.calibration.calibrate import calibrate
from diffkv_jax.calibration.calibration import Calibration
from diffkv_jax.evaluation.answers import encoded
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy

SEQUENCES, LENGTH = 8, 512  # tokens of the text that are learned from, at most


def learns(policy: CompressionPolicy) -> bool:
    """Whether its codecs or its transform need a calibration."""
    return policy.transform.learned or any(fmt.learned for fmt in policy.formats("bfloat16"))


def learned(
    model: CausalLM, params: Any, tokenizer: Any, policy: CompressionPolicy, text: str | None
) -> Calibration | None:
    """What the policy learns from the beginning of `text`; None where it learns nothing.

    Raises:
        ValueError: the text is missing or too short.
    """
    if not learns(policy):
        return None
    # up to twelve characters a token are tokenised, not the whole of a long text
    ids = encoded(tokenizer, (text or "")[: 12 * SEQUENCES * LENGTH])
    length = min(LENGTH, len(ids), model.attention.max_position_embeddings)
    rows = min(SEQUENCES, len(ids) // max(length, 1))
    if length < 32:
        raise ValueError(
            f"policy {policy.name!r} learns from a text of at least 32 tokens, given {len(ids)}: "
            "give a longer one"
        )
    tokens = np.array(ids[: rows * length]).reshape(rows, length)
    return calibrate(model, params, tokens, policy, progress=sys.stderr.isatty())
