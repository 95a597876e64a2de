"""Key-value retrieval (Liu et al., "Lost in the Middle", arXiv:2307.03172): a JSON object of random
identifiers, and the value of one of its keys asked for.
"""

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Unpack

import numpy as np

from diffkv_jax.arguments import integer, refuse
from diffkv_jax.evaluation.answers import RunOptions, answers, encoded
from diffkv_jax.evaluation.files import read_lines
from diffkv_jax.evaluation.result import TaskResult
from diffkv_jax.inputs import as_policy
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy

HEAD = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
)
ANSWER = 48  # tokens: an identifier has 36 characters


@dataclass(frozen=True)
class Records:
    """An object of (key, value) `pairs` and which of its keys are asked for."""

    pairs: tuple[tuple[str, str], ...]
    asked: tuple[int, ...]

    @property
    def document(self) -> str:
        """What stands before the questions."""
        lines = ",\n ".join(f'"{key}": "{value}"' for key, value in self.pairs)
        return f"{HEAD}{{{lines}}}"

    def question(self, turn: int = 0) -> str:
        """The question for the `turn`-th key that is asked for."""
        return f'\n\nKey: "{self.pairs[self.asked[turn]][0]}"\nCorresponding value:'

    def value(self, turn: int = 0) -> str:
        """Its answer."""
        return self.pairs[self.asked[turn]][1]

    def depth(self, turn: int = 0) -> float:
        """Where it stands, 0 to 1."""
        return self.asked[turn] / max(len(self.pairs) - 1, 1)


def draw_records(count: int, records: int, *, seed: int = 0) -> list[Records]:
    """`count` objects of `records` random pairs; two keys of each are asked for, evenly spread over
    the depths.

    Raises:
        TypeError, ValueError: less than one object of two records.
    """
    count, size = integer("count", count, least=1), integer("records", records, least=2)
    rng = random.Random(integer("seed", seed))
    found = []
    for i in range(count):
        ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2 * size)]
        first = round(i * (size - 1) / max(count - 1, 1))
        second = rng.choice([k for k in range(size) if k != first])
        found.append(Records(tuple(zip(ids[::2], ids[1::2], strict=True)), (first, second)))
    return found


def read_records(
    path: str | PathLike[str],
    count: int | None = None,
    records: int | None = None,
    *,
    seed: int = 0,
) -> list[Records]:
    """The first `count` problems of a .jsonl(.gz) file with "ordered_kv_records", "key" and
    "value", as the authors publish them, cut to `records` pairs (None: all) around the key asked
    for. A second key is drawn.

    Raises:
        TypeError, ValueError: no such file, or other fields; fewer problems than `count`.
    """
    fields = ("ordered_kv_records", "key", "value")
    rng, found = random.Random(integer("seed", seed)), []
    for row in read_lines("retrieval", path, fields, count):
        pairs = [(str(key), str(value)) for key, value in row["ordered_kv_records"]]
        if (row["key"], row["value"]) not in pairs or len(pairs) < 2:
            refuse("key", row["key"], "one of two or more records, with its value")
        at, size = pairs.index((row["key"], row["value"])), min(records or len(pairs), len(pairs))
        others = sorted(rng.sample([i for i in range(len(pairs)) if i != at], max(size, 2) - 1))
        kept = sorted([at, *others])
        asked = kept.index(at), kept.index(rng.choice(others))
        found.append(Records(tuple(pairs[i] for i in kept), asked))
    return found


def records_within(tokenizer: Any, context: int) -> int:
    """How many pairs make up `context` tokens, question and answer included.

    Raises:
        ValueError: not even two.
    """
    few, many = (
        len(encoded(tokenizer, (one := draw_records(1, n)[0]).document + one.question()))
        for n in (2, 12)
    )
    found = 2 + int((context - ANSWER - few) // ((many - few) / 10 * 1.05))
    if found < 2:
        least = few + ANSWER + 1
        refuse("context", context, f"at least {least} for two records and an answer: raise it")
    return found


def key_value_retrieval(
    model: CausalLM,
    params: Any,
    tokenizer: Any,
    policy: CompressionPolicy | str | None,
    problems: Sequence[Records],
    *,
    question_after: bool = True,
    **options: Unpack[RunOptions],
) -> TaskResult:
    """Ask for the value of the first key of each of `problems`: after the document has been
    compressed (`question_after`), or with it in one prompt. Right is an answer that holds the
    value.

    Raises:
        TypeError, ValueError: bad input, named; more tokens than the model's context.
    """
    policy = as_policy(policy)
    questions = [one.question() for one in problems]
    prompts = [one.document for one in problems]
    if not question_after:
        prompts = [prompt + asked for prompt, asked in zip(prompts, questions, strict=True)]
    turns = [questions] if question_after else []
    given = (model, params, tokenizer, prompts, policy)
    found = answers(*given, turns=turns, max_new_tokens=ANSWER, **options)
    return graded("retrieval", policy.name, problems, found.turns[0], 0, found.of_bf16)


def graded(
    task: str,
    policy: str,
    problems: Sequence[Records],
    texts: Sequence[str],
    turn: int,
    of_bf16: float,
) -> TaskResult:
    """Which of `texts` hold the value of the `turn`-th key."""
    expected = tuple(one.value(turn) for one in problems)
    right = [value.lower() in text.lower() for value, text in zip(expected, texts, strict=True)]
    details = tuple({"depth": one.depth(turn), "records": len(one.pairs)} for one in problems)
    scores = np.array(right, np.float64)
    return TaskResult(task, policy, scores, tuple(texts), expected, details, of_bf16)
