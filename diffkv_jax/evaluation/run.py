"""Everything that a command asks for, measured: the full cache first, then each policy."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax

from diffkv_jax.batching import check_context
from diffkv_jax.choice.fitted import FittedPolicy
from diffkv_jax.evaluation.answers import RunOptions
from diffkv_jax.evaluation.asked import Asked
from diffkv_jax.evaluation.learning import settled
from diffkv_jax.evaluation.math_problems import gsm8k, math500, read_gsm8k, read_math500
from diffkv_jax.evaluation.needle import passkey_prompts, passkeys
from diffkv_jax.evaluation.on_texts import OnTexts, full_cache, on_texts, text_rows
from diffkv_jax.evaluation.questions import TwoQuestions, two_questions
from diffkv_jax.evaluation.result import TaskResult
from diffkv_jax.evaluation.retrieval import (
    Records,
    draw_records,
    key_value_retrieval,
    read_records,
    records_within,
)
from diffkv_jax.evaluation.ruler_tasks import ruler, ruler_problems
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy


@dataclass(frozen=True)
class Loaded:
    """What `load_pretrained` returned, with a tokenizer."""

    model: CausalLM
    params: Any
    tokenizer: Any


@dataclass
class Results:
    """What has been measured so far.

    Attributes:
        texts: the names of the texts, in the order of their rows.
        policies: by the name that reports show, fitted where that was asked for.
        on_texts: by policy.
        full: results of the full cache, by task.
        tasks: by policy, and then by task.
        failed: what a policy was refused with, by policy and then by task.
    """

    texts: tuple[str, ...] = ()
    policies: dict[str, CompressionPolicy] = field(default_factory=dict)
    on_texts: dict[str, OnTexts] = field(default_factory=dict)
    full: dict[str, TaskResult] = field(default_factory=dict)
    tasks: dict[str, dict[str, TaskResult]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)


def measure(asked: Asked, loaded: Loaded, keep: Callable[[Results], None]) -> Results:
    """Run all policies on all texts and tasks; `keep` is called with what there is after each. A
    policy that is refused by one does not end the others.

    Raises:
        TypeError, ValueError: bad input, named; before anything is run where possible.
    """
    check_context(loaded.model.attention, *_longest(asked))
    for policy in asked.policies.values():
        if isinstance(policy, FittedPolicy):
            policy.check(loaded.model, loaded.params)
    given, found = (loaded.model, loaded.params, loaded.tokenizer), Results(tuple(asked.texts))
    options: RunOptions = {"batch_size": asked.batch_size, "cache_dtype": asked.cache_dtype}
    options["prefill_chunk"] = asked.prefill_chunk
    runs = {task: _runner(task, asked, loaded) for task in asked.tasks if task != "kl"}
    fed = _fed(asked, loaded, options) if "kl" in asked.tasks else None
    for task, run in runs.items():
        own: RunOptions = {**options, "progress": _shown(f"full cache: {task}")}
        found.full |= _listed(run(*given, CompressionPolicy.none(), **own))
    length = asked.context + asked.steps
    for name, policy in asked.policies.items():
        own = {**options, "progress": _shown(name)}
        try:
            policy, own["calibration"] = settled(name, policy, loaded, asked.calibrate, length)
        except ValueError as error:
            found.failed[name] = dict.fromkeys(asked.tasks, str(error))
            keep(found)
            continue
        found.policies[name] = policy
        for task in asked.tasks:
            _drop_programs()
            try:
                if task == "kl" and fed is not None:
                    found.on_texts[name] = fed(policy=policy, **own)
                else:
                    results = _listed(runs[task](*given, policy, **own))
                    found.tasks.setdefault(name, {}).update(results)
            except ValueError as error:
                found.failed.setdefault(name, {})[task] = str(error)
            keep(found)
    return found


def _fed(asked: Asked, loaded: Loaded, options: RunOptions) -> Callable[..., OnTexts]:
    """`on_texts` with the texts' tokens, and with what the full cache says to them."""
    tokens = text_rows(loaded.tokenizer, asked.texts, asked.context + asked.steps + 1)
    given = loaded.model, loaded.params, tokens, asked.context
    full = full_cache(*given, **{**options, "progress": _shown("full cache")})
    return partial(on_texts, *given, full=full)


def _shown(name: str) -> str | None:
    """The name of a progress bar, in a terminal."""
    return name if sys.stderr.isatty() else None


def _drop_programs() -> None:
    """Forget compiled programs before XLA has mapped as many as Linux allows (65,530): it aborts
    there.
    """
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


def _longest(asked: Asked) -> tuple[Any, int]:
    """Tokens that the longest text or prompt comes to, twice, as `check_context` takes them."""
    lengths = [asked.context + asked.steps * ("kl" in asked.tasks)]
    lengths += asked.lengths if "needle" in asked.tasks else ()
    return [max(lengths)], max(lengths)


def _runner(task: str, asked: Asked, loaded: Loaded) -> Callable[..., TaskResult | TwoQuestions]:
    """A task with its problems, read or drawn once: (model, params, tokenizer, policy, **options)
    -> result.
    """
    tokenizer = loaded.tokenizer
    if task == "needle":
        text, depths = next(iter(asked.texts.values())), asked.depths
        for length in asked.lengths:  # refuses a text that is too short before anything is run
            passkey_prompts(tokenizer, text, length, depths)
        return partial(passkeys, text=text, lengths=asked.lengths, depths=depths)
    if task == "gsm8k":
        return partial(gsm8k, problems=read_gsm8k(asked.data[task], asked.problems))
    if task == "math500":
        return partial(math500, problems=read_math500(asked.data[task], asked.problems))
    if task.startswith("ruler:"):
        problems = ruler_problems(
            tokenizer,
            task.partition(":")[2],
            context=asked.context,
            samples=asked.problems,
            seed=asked.seed,
            folder=asked.data["ruler"],
        )
        return partial(ruler, problems=problems, question_after=asked.question_after)
    records = _records(asked, tokenizer)
    if task == "two_questions":
        return partial(two_questions, problems=records)
    return partial(key_value_retrieval, problems=records, question_after=asked.question_after)


def _listed(found: TaskResult | TwoQuestions) -> dict[str, TaskResult]:
    """One result or those of both questions, by their tasks' names."""
    both = isinstance(found, TwoQuestions)
    listed = (found.first, found.second, found.second_fresh) if both else (found,)
    return {one.task: one for one in listed}


def _records(asked: Asked, tokenizer: Any) -> list[Records]:
    """Those of the file, or drawn, as many as make up the context."""
    size = records_within(tokenizer, asked.context)
    if path := asked.data.get("retrieval"):
        return read_records(path, asked.problems, size, seed=asked.seed)
    return draw_records(asked.problems, size, seed=asked.seed)
