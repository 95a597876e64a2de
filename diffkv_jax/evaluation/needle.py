"""Passkeys: a number hidden at several depths of texts of several lengths, asked for at the end."""

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np

from diffkv_jax.arguments import integer, tuple_of
from diffkv_jax.evaluation.answers import RunOptions, answers, encoded
from diffkv_jax.evaluation.result import TaskResult
from diffkv_jax.inputs import as_policy
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy

PASSKEY = 48213
NEEDLE = f"\n\nThe pass key is {PASSKEY}. Remember it. {PASSKEY} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"
ANSWER = 8  # tokens


def passkey_prompts(tokenizer: Any, text: str, context: int, depths: int) -> np.ndarray:
    """int32 [depths, context]: `text` with the needle at evenly spaced depths, closed by the
    question.

    Raises:
        ValueError: the text is too short for `context` tokens.
    """
    # texts of several tokens a word are read as far as needed
    needle, question = (encoded(tokenizer, part, begins=False) for part in (NEEDLE, QUESTION))
    room = context - len(needle) - len(question)
    hay = encoded(tokenizer, text[: 12 * context])[: max(room, 0)]
    if room < 1 or len(hay) < room:
        raise ValueError(
            f"context={context} must hold needle and question of {context - room} tokens and be "
            f"filled by the text, which has {len(hay)}: give a longer text or another context"
        )
    places = [round(len(hay) * (i + 0.5) / depths) for i in range(depths)]
    return np.array([hay[:at] + needle + hay[at:] + question for at in places], np.int32)


def passkeys(
    model: CausalLM,
    params: Any,
    tokenizer: Any,
    policy: CompressionPolicy | str | None,
    text: str,
    *,
    lengths: Sequence[int] = (1024,),
    depths: int = 5,
    **options: Unpack[RunOptions],
) -> TaskResult:
    """Whether the greedy answer holds the passkey, for prompts of `lengths` tokens of `text` with
    it at `depths` depths; `details` says "depth" (0 to 1) and "length" of each.

    Raises:
        TypeError, ValueError: bad input, named; a text that is too short.
    """
    policy, depths = as_policy(policy), integer("depths", depths, least=1)
    rule = "a list of prompt lengths in tokens"
    sizes = tuple_of("lengths", lengths, lambda name, n: integer(name, n, least=1), rule)
    prompts = {size: passkey_prompts(tokenizer, text, size, depths) for size in sizes}
    texts, details, bytes_of = [], [], []
    for size, rows in prompts.items():
        given = (model, params, tokenizer, rows.tolist(), policy)
        found = answers(*given, max_new_tokens=ANSWER, **options)
        texts += found.turns[0]
        details += [{"depth": (i + 0.5) / depths, "length": size} for i in range(depths)]
        bytes_of.append(found.of_bf16)
    scores = np.array([str(PASSKEY) in answer for answer in texts], np.float64)
    expected = (str(PASSKEY),) * len(texts)
    # the longest prompts: those that compression is for
    of_bf16 = bytes_of[int(np.argmax(sizes))]
    return TaskResult(
        "needle", policy.name, scores, tuple(texts), expected, tuple(details), of_bf16
    )
