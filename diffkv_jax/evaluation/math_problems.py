"""GSM8K (arXiv:2110.14168) and MATH-500 (arXiv:2103.03874, arXiv:2305.20050), greedily."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Unpack

import numpy as np

from diffkv_jax.evaluation.answers import RunOptions, answers, encoded
from diffkv_jax.evaluation.files import read_lines
from diffkv_jax.evaluation.math_answers import boxed, final_number, same_expression, same_number
from diffkv_jax.evaluation.result import TaskResult
from diffkv_jax.inputs import as_policy
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy

STEPS = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """A question in words and its final answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class _Task:
    """A name, and how an answer is taken out of a text and compared."""

    name: str
    extract: Callable[[str], str | None]
    same: Callable[[str | None, str], bool]


_GSM8K = _Task("gsm8k", final_number, same_number)
_MATH = _Task("math500", boxed, same_expression)


def read_gsm8k(path: str | PathLike[str], count: int | None = None) -> list[Problem]:
    """The first `count` problems (None: all) of the authors' JSON lines ("question", "answer").

    Raises:
        TypeError, ValueError: no such file, other fields, or fewer problems.
    """
    rows = read_lines("gsm8k", path, ("question", "answer"), count)
    return [Problem(row["question"], row["answer"].rsplit("####", 1)[-1].strip()) for row in rows]


def read_math500(path: str | PathLike[str], count: int | None = None) -> list[Problem]:
    """The first `count` problems (None: all) of JSON lines with "problem" and "answer".

    Raises:
        TypeError, ValueError: no such file, other fields, or fewer problems.
    """
    rows = read_lines("math500", path, ("problem", "answer"), count)
    return [Problem(row["problem"], row["answer"]) for row in rows]


def gsm8k(
    model: CausalLM,
    params: Any,
    tokenizer: Any,
    policy: CompressionPolicy | str | None,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 512,
    **options: Unpack[RunOptions],
) -> TaskResult:
    """GSM8K without examples: right is a final number equal to the answer's.

    The final number stands behind "####" or in `boxed`, else it is the last one. The question goes
    through the tokenizer's chat template where it has one.

    Raises:
        TypeError, ValueError: bad input, named; more tokens than the model's context.
    """
    given = (model, params, tokenizer, policy, problems, max_new_tokens)
    return _solved(_GSM8K, *given, **options)


def math500(
    model: CausalLM,
    params: Any,
    tokenizer: Any,
    policy: CompressionPolicy | str | None,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int = 1024,
    **options: Unpack[RunOptions],
) -> TaskResult:
    """MATH-500 without examples: right is what stands in the last `boxed`, when it is the answer
    but for LaTeX's spellings. The question goes through the tokenizer's chat template where it has
    one.

    Raises:
        TypeError, ValueError: bad input, named; more tokens than the model's context.
    """
    given = (model, params, tokenizer, policy, problems, max_new_tokens)
    return _solved(_MATH, *given, **options)


def _solved(
    task: _Task,
    model: CausalLM,
    params: Any,
    tokenizer: Any,
    policy: CompressionPolicy | str | None,
    problems: Sequence[Problem],
    most: int,
    **options: Unpack[RunOptions],
) -> TaskResult:
    policy, chat = as_policy(policy), bool(getattr(tokenizer, "chat_template", None))
    prompts = [_prompt(tokenizer, one.question, chat) for one in problems]
    until = () if chat else ("\nQuestion:", "\nProblem:")
    given = (model, params, tokenizer, prompts, policy)
    found = answers(*given, max_new_tokens=most, until=until, **options)
    (texts,) = found.turns
    said = [task.extract(text) for text in texts]
    right = [task.same(one, problem.answer) for one, problem in zip(said, problems, strict=True)]
    return TaskResult(
        task.name,
        policy.name,
        np.array(right, np.float64),
        texts,
        tuple(one.answer for one in problems),
        tuple({"said": one} for one in said),
        found.of_bf16,
    )


def _prompt(tokenizer: Any, question: str, chat: bool) -> list[int]:
    if not chat:
        return encoded(tokenizer, f"Question: {question}\n{STEPS}\nAnswer:")
    talk = [{"role": "user", "content": f"{question}\n{STEPS}"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    return encoded(tokenizer, text, begins=False)
