"""`two_questions`: whether a cache that answered one question still answers another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

from diffkv_jax.evaluation.answers import RunOptions, answers
from diffkv_jax.evaluation.result import TaskResult
from diffkv_jax.evaluation.retrieval import ANSWER, Records, graded
from diffkv_jax.inputs import as_policy
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy


@dataclass(frozen=True)
class TwoQuestions:
    """Answers over one document.

    Attributes:
        first: the first question, on a fresh cache of the document.
        second: the second question, on the cache that has answered the first.
        second_fresh: the second question, on a fresh cache of the document.
    """

    first: TaskResult
    second: TaskResult
    second_fresh: TaskResult


def two_questions(
    model: CausalLM,
    params: Any,
    tokenizer: Any,
    policy: CompressionPolicy | str | None,
    problems: Sequence[Records],
    **options: Unpack[RunOptions],
) -> TwoQuestions:
    """Ask for two keys of each document (`draw_records`, `read_records`), both after it has been
    compressed: one after the other, and the second also on a cache of its own.

    Raises:
        TypeError, ValueError: bad input, named; more tokens than the model's context.
    """
    policy = as_policy(policy)
    both = [[one.question(turn) for one in problems] for turn in range(2)]
    given = (model, params, tokenizer, [one.document for one in problems], policy)
    shared = answers(*given, turns=both, max_new_tokens=ANSWER, **options)
    fresh = answers(*given, turns=both[1:], max_new_tokens=ANSWER, **options)
    name = policy.name
    return TwoQuestions(
        graded("first question", name, problems, shared.turns[0], 0, shared.of_bf16),
        graded("second question", name, problems, shared.turns[1], 1, shared.of_bf16),
        graded("second question alone", name, problems, fresh.turns[0], 1, fresh.of_bf16),
    )
