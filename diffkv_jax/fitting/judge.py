"""What an explicit policy costs on the built-in text, for `choice.judged`."""

from collections.abc import Mapping
from typing import Any

from diffkv_jax.calibration.calibration import Calibration
from diffkv_jax.choice.judged import judges_policies
from diffkv_jax.fitting.fit import texts_of
from diffkv_jax.fitting.measure import Bench
from diffkv_jax.fitting.texts import LEAST, STEPS
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy

CONTEXT = 512
ROWS = 2


@judges_policies
def mean_kl(
    model: CausalLM,
    params: Mapping[str, Any],
    policy: CompressionPolicy,
    calibration: Calibration | None,
) -> float:
    """Mean KL in nats behind 512 tokens (or the model's context) of text that goes on; 0 where that
    is too short to tell.
    """
    if model.attention.max_position_embeddings < LEAST + STEPS + 1:
        return 0.0
    texts = texts_of(model, None, CONTEXT)[0]
    texts = texts._replace(rows=texts.rows[:ROWS])
    return Bench(model, params, texts, CONTEXT).of(policy, calibration).going_on
