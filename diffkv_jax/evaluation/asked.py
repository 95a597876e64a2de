"""What the command line asks for, checked before a model is loaded."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffkv_jax.arguments import file_path, integer, nearest, refuse
from diffkv_jax.batching import chunk_size
from diffkv_jax.evaluation.files import existing_file, read_text
from diffkv_jax.evaluation.policies import Given, policy_of
from diffkv_jax.evaluation.ruler_package import TASKS as RULER_TASKS, ruler_folder
from diffkv_jax.policy.policy import CompressionPolicy

TASKS = (
    "kl",
    "needle",
    "retrieval",
    "two_questions",
    "gsm8k",
    "math500",
    *(f"ruler:{task}" for task in RULER_TASKS),
)
OF_TEXTS = ("kl", "needle")  # tasks that need --text
OF_FILES = ("gsm8k", "math500")  # tasks that need --data


@dataclass(frozen=True)
class Asked:
    """A run of the command: `python -m diffkv_jax.evaluation --help` says what each means.

    Attributes:
        texts, policies: by the name that reports show.
        tasks: of `TASKS`, "ruler" written out.
        calibrate: the text to calibrate by; None: none was given.
        data: paths by the name of the task that reads them.
        arguments: all of them as they were given, for the report.
    """

    model: str
    texts: dict[str, str]
    policies: dict[str, Given]
    tasks: tuple[str, ...]
    context: int
    steps: int
    out: Path
    calibrate: str | None
    data: dict[str, Path]
    problems: int
    question_after: bool
    lengths: tuple[int, ...]
    depths: int
    batch_size: int
    dtype: str
    cache_dtype: str | None
    prefill_chunk: int
    seed: int
    arguments: dict[str, Any]


def asked_of(given: argparse.Namespace) -> Asked:
    """The arguments with files read and policies made.

    Raises:
        TypeError, ValueError: bad input, named.
    """
    tasks, texts = _tasks(given.tasks), _texts(given.text)
    context = integer("--context", given.context, least=1)
    steps = integer("--steps", given.steps, least=1)
    problems = integer("--problems", given.problems, least=1)
    if needy := [task for task in tasks if task in OF_TEXTS and not texts]:
        raise ValueError(f"--tasks {needy[0]} needs a text: give --text FILE")
    least = context + steps + 1
    for name, text in texts.items():
        if "kl" in tasks and len(text.encode()) < least:  # a token is at least a byte
            rule = f"a text of at least {least} tokens (context, steps and one); give a longer one"
            refuse("--text", name, f"{rule} or lower --context")
    policies = _policies(given.policy)
    calibrate = given.calibrate and read_text("--calibrate", given.calibrate)
    for policy in policies.values():
        if isinstance(policy, CompressionPolicy):
            chunk_size(context, given.prefill_chunk, policy.queries)
    return Asked(
        model=given.model,
        texts=texts,
        policies=policies,
        tasks=tasks,
        context=context,
        steps=steps,
        out=_folder(given.out),
        calibrate=calibrate,
        data=_data(given.data, tasks),
        problems=problems,
        question_after=not given.question_with,
        lengths=_lengths(given.lengths, context),
        depths=integer("--depths", given.depths, least=1),
        batch_size=integer("--batch-size", given.batch_size, least=1),
        dtype=given.dtype,
        cache_dtype=given.cache_dtype,
        prefill_chunk=given.prefill_chunk,
        seed=integer("--seed", given.seed, least=0),
        arguments=vars(given),
    )


def _policy(spelled: str) -> tuple[str, Given]:
    """By the name that reports show: that of a file's policy, else as it is spelled."""
    policy = policy_of(spelled)
    if not isinstance(policy, CompressionPolicy):
        return spelled, policy
    name = policy.name if spelled.endswith(".json") else spelled
    return name, _named(policy, name)


def _named(policy: Given, name: str) -> Given:
    return replace(policy, name=name) if isinstance(policy, CompressionPolicy) else policy


def _policies(spelled: Sequence[str]) -> dict[str, Given]:
    """By the names that reports show, as they are spelled where two have the same."""
    found = [_policy(one) for one in spelled]
    names = [name for name, _ in found]
    if len(set(names)) == len(names):
        return dict(found)
    pairs = zip(spelled, found, strict=True)
    return {one: _named(policy, one) for one, (_, policy) in pairs}


def _tasks(listed: str) -> tuple[str, ...]:
    found = []
    for name in filter(None, map(str.strip, listed.split(","))):
        several = (
            [task for task in TASKS if task.startswith("ruler:")] if name == "ruler" else [name]
        )
        if several[0] not in TASKS:
            refuse("--tasks", name, f"one of {['ruler', *TASKS]}{nearest([name], TASKS)}")
        found += several
    if not found:
        refuse("--tasks", listed, "names of tasks with commas, such as kl,needle")
    return tuple(dict.fromkeys(found))


def _texts(paths: Sequence[str]) -> dict[str, str]:
    """Texts by their file's name, by the path where two have the same."""
    names = [Path(path).name for path in paths]
    unique = len(set(names)) == len(names)
    pairs = zip(names if unique else paths, paths, strict=True)
    return {name: read_text("--text", path) for name, path in pairs}


def _data(given: Sequence[str], tasks: Sequence[str]) -> dict[str, Path]:
    takers, found = ("gsm8k", "math500", "retrieval", "ruler"), {}
    for entry in given:
        name, _, path = entry.partition("=")
        if name not in takers or not path:
            refuse("--data", entry, f"TASK=PATH with one of {list(takers)}")
        found[name] = ruler_folder(path) if name == "ruler" else existing_file("--data", path)
    for task in tasks:
        if task in OF_FILES and task not in found:
            raise ValueError(f"--tasks {task} needs its problems: give --data {task}=FILE")
    if any(task.startswith("ruler:") for task in tasks) and "ruler" not in found:
        found["ruler"] = ruler_folder()
    return found


def _lengths(given: str | None, context: int) -> tuple[int, ...]:
    if given is None:
        return (max(context // 2, 1), context)
    try:
        return tuple(integer("--lengths", int(n), least=1) for n in given.split(","))
    except ValueError:
        refuse("--lengths", given, "numbers of tokens with commas, such as 512,1024")


def _folder(given: str) -> Path:
    path = file_path("--out", given)
    if path.exists() and not path.is_dir():
        refuse("--out", given, "a folder, and that is a file: give another")
    return path
