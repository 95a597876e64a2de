"""What comes in: prompts of real problems and long documents, lengths of answers, arrivals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffkv_jax.testing.texts import load_text


class Arrival(NamedTuple):
    """One request."""

    seconds: float  # after the start
    prompt: list[int]
    new_tokens: int  # that it always generates


def arrivals(
    tokenizer,
    count: int,
    *,
    prompt_tokens: int,
    new_tokens: int,
    problems: Path | None,
    rate: float | None,
    seed: int = 0,
) -> list[Arrival]:
    """`count` requests, all at once or `rate` a second (Poisson). The prompts are `problems` of a
    file of JSON lines (GSM8K, MATH-500), or stretches of a long document of `prompt_tokens`; the
    answers have `new_tokens`, with a spread of a third for problems.
    """
    rng = np.random.default_rng(seed)
    made = (
        _documents(tokenizer, prompt_tokens) if problems is None else _problems(tokenizer, problems)
    )
    gaps = np.zeros(count) if rate is None else rng.exponential(1 / rate, count)
    spread = 0.0 if problems is None else 1 / 3
    lengths = new_tokens * (1 + spread * rng.uniform(-1, 1, count))
    at = np.cumsum(gaps)
    return [Arrival(float(at[i]), made(i), int(lengths[i])) for i in range(count)]


def _documents(tokenizer, length: int) -> Callable[[int], list[int]]:
    ids = tokenizer(load_text("king_james")[:2_000_000], verbose=False).input_ids

    def document(i: int) -> list[int]:
        first = i * length % (len(ids) - length)
        return ids[first : first + length]

    return document


def _problems(tokenizer, path: Path) -> Callable[[int], list[int]]:
    lines = path.read_text(encoding="utf-8").splitlines()

    def problem(i: int) -> list[int]:
        found = json.loads(lines[i % len(lines)])
        message = {"role": "user", "content": found.get("question") or found["problem"]}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False).input_ids

    return problem
