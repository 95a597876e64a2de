"""The sections of `benchmarks peers` that drive worker processes: decode, prefill, quality and
throughput in a fixed memory.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.results import OK, Entry, Results
from benchmarks.peers.systems import OURS_BUDGET, REFERENCE, SYSTEMS, Decoded
from benchmarks.peers.worker import Reply, Worker, WorkerError
from diffkv_jax.evaluation import quality

MIB = 2**20
PROMPT_TEXT = "king_james"
Call = Callable[[str], tuple[str, tuple]]  # of a system's name: the method and its arguments


@dataclass
class Run:
    """One invocation: its workers, what to measure, and where the results go.

    Attributes:
        texts: token ids by name, as many as the longest context and its steps need; the prompt's
            and the `quality_texts`.
        deadline: `time.monotonic()` after which no cell is begun.
        failed: why a system is not at hand.
    """

    name: str
    results: Results
    start: Callable[[str], Worker]
    systems: Sequence[str]
    texts: Mapping[str, np.ndarray]
    quality_texts: Sequence[str]
    contexts: Sequence[int]
    batches: Sequence[int]
    rounds: int
    steps: int
    work: Path
    deadline: float = float("inf")
    workers: dict[str, Worker] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def open(self) -> None:
        """Start every system; one that cannot is kept in `failed`."""
        for name in self.systems:
            self.open_one(name)

    def open_one(self, name: str) -> None:
        """Start one system."""
        try:
            self.workers[name] = self.start(name)
        except WorkerError as error:
            self.failed[name] = str(error)
        print(f"{name}: {self.failed.get(name, 'loaded')}", flush=True)

    def close(self) -> None:
        """End every process."""
        for worker in self.workers.values():
            worker.close()

    def add(
        self,
        section: str,
        labels: dict[str, Any],
        system: str,
        samples: Sequence[float],
        facts: dict[str, Any],
        status: str = OK,
    ) -> None:
        """Keep one entry."""
        self.results.add(Entry(section, labels, system, self.name, list(samples), facts, status))

    def late(self, section: str, labels: dict[str, Any], systems: Sequence[str]) -> bool:
        """Whether the time is over; then each system's entry says so."""
        if time.monotonic() < self.deadline:
            return False
        for name in systems:
            self.add(section, labels, name, [], {}, "not begun: the time of this run was over")
        return True

    def in_turns(self, call: Call, systems: Sequence[str]) -> dict[str, list[Reply] | str]:
        """Every system's reply of each round, or why it has none. The first round warms up; every
        other one goes backwards.
        """
        found: dict[str, list[Reply] | str] = {name: self.failed.get(name, []) for name in systems}
        for turn in range(self.rounds + 1):
            for name in systems if turn % 2 else reversed(systems):
                replies = found[name]
                if isinstance(replies, str):
                    continue
                method, arguments = call(name)
                try:
                    reply = self.workers[name].call(method, *arguments)
                except WorkerError as error:
                    found[name] = str(error)
                else:
                    replies += [reply] if turn else []
        return found

    def once(self, name: str, method: str, *arguments: Any) -> Reply:
        """One call of one system.

        Raises:
            WorkerError: it failed now, or never started.
        """
        if name in self.failed:
            raise WorkerError(self.failed[name])
        return self.workers[name].call(method, *arguments)


def decode(run: Run) -> None:
    """Tokens a second of every context and batch, each round from the same prefilled cache."""
    for context in run.contexts:
        prompt = run.texts[PROMPT_TEXT][:context]
        reasons: dict[str, str] | None = None
        for batch in run.batches:
            labels = {"context": context, "batch": batch}
            if run.late("decode", labels, run.systems):
                continue
            reasons = _prefilled(run, prompt, run.systems) if reasons is None else reasons
            able = [name for name in run.systems if name not in reasons]
            found = reasons | run.in_turns(
                lambda _, batch=batch: ("decode", (batch, run.steps)), able
            )
            for name, replies in found.items():
                if isinstance(replies, str):
                    run.add("decode", labels, name, [], {}, replies)
                    continue
                seconds, facts = _decoded(replies, run.steps)
                facts["KV bytes a token"] = facts["KV MiB"] * MIB / (batch * (context + run.steps))
                run.add("decode", labels, name, [batch * run.steps / s for s in seconds], facts)
            print(f"decode {labels}: done", flush=True)


def _prefilled(run: Run, prompt: np.ndarray, systems: Sequence[str]) -> dict[str, str]:
    """Give every system the prompt; why some could not take it."""
    reasons = {}
    for name in systems:
        try:
            began = time.monotonic()
            run.once(name, "keep", prompt)
            print(
                f"{name}: has a cache of {prompt.size} tokens, {time.monotonic() - began:.1f} s",
                flush=True,
            )
        except WorkerError as error:
            reasons[name] = str(error)
            print(f"{name}: {error}", flush=True)
    return reasons


def _decoded(replies: Sequence[Reply], steps: int) -> tuple[list[float], dict[str, Any]]:
    values: list[Decoded] = [reply.value for reply in replies]
    seconds = [value.seconds for value in values]
    facts = {
        "ms a step": 1e3 * float(np.median(seconds)) / steps,
        "KV MiB": max(v.kv_bytes for v in values) / MIB,
    }
    return seconds, facts | {"peak MiB": max(reply.peak_bytes for reply in replies) / MIB}


def prefill(run: Run) -> None:
    """Prompt tokens a second, and seconds to the first token of a batch that arrives at once."""
    for context in run.contexts:
        for batch in run.batches:
            labels = {"context": context, "batch": batch}
            if run.late("prefill", labels, run.systems):
                continue
            prompts = np.resize(run.texts[PROMPT_TEXT][:context], (batch, context))
            for name, replies in run.in_turns(
                lambda _, prompts=prompts: ("prefill", (prompts,)), run.systems
            ).items():
                if isinstance(replies, str):
                    run.add("prefill", labels, name, [], {}, replies)
                    continue
                seconds = [reply.value for reply in replies]
                peak = max(reply.peak_bytes for reply in replies) / MIB
                run.add(
                    "prefill",
                    labels,
                    name,
                    [prompts.size / s for s in seconds],
                    {"first token s": float(np.median(seconds)), "peak MiB": peak},
                )
            print(f"prefill {labels}: done", flush=True)


def quality_section(run: Run) -> None:
    """Perplexity and KL of `steps` tokens fed after each context, against transformers in float32
    and each system's own full cache.
    """
    needed = [REFERENCE, *(c for name in run.systems if (c := SYSTEMS[name].counterpart))]
    systems = list(dict.fromkeys([*(name for name in SYSTEMS if name in needed), *run.systems]))
    for context in run.contexts:
        for text in run.quality_texts:
            labels = {"text": text, "context": context, "fed": run.steps}
            if not run.late("quality", labels, run.systems):
                _quality_of(
                    run, labels, run.texts[text][: context + run.steps + 1], context, systems
                )
                print(f"quality {labels}: done", flush=True)


def _quality_of(
    run: Run, labels: dict[str, Any], tokens: np.ndarray, context: int, systems: Sequence[str]
) -> None:
    """One text. The share of steps with the same top token is that of the last comparison: the own
    full cache where there is one.
    """
    full: dict[str, np.ndarray] = {}
    for name in systems:
        try:
            log_probs, facts = _log_probs(run, name, tokens, context, full), {}
            facts["perplexity"] = float(
                np.exp(-np.take_along_axis(log_probs, tokens[context + 1 :, None], axis=-1).mean())
            )
            for title, other in (
                ("KL to float32", REFERENCE),
                ("KL to own full cache", SYSTEMS[name].counterpart),
            ):
                if other is not None and other != name:
                    reference = _log_probs(run, other, tokens, context, full)
                    compared = quality(
                        reference[None], log_probs[None], tokens[None, context + 1 :]
                    )
                    facts |= {
                        title: float(compared.kl.mean()),
                        "same top token": float(compared.top1.mean()),
                    }
        except WorkerError as error:
            run.add("quality", labels, name, [], {}, str(error))
        else:
            run.add("quality", labels, name, [], facts)


def _log_probs(
    run: Run, name: str, tokens: np.ndarray, context: int, full: dict[str, np.ndarray]
) -> np.ndarray:
    """float32 [fed, vocab] of a system. Those of full caches are kept in `full`, and of peers in
    the work folder for later runs.
    """
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
    path = run.work / f"{name}-{context}-{digest}.npy"
    if name not in full and path.exists():
        full[name] = np.load(path)
    if name in full:
        return full[name]
    if name not in run.workers and name not in run.failed:
        run.open_one(name)
    value: np.ndarray = run.once(name, "teacher_forced", tokens[:-1], context).value
    if SYSTEMS[name].counterpart is None:
        full[name] = value
        if not name.startswith("ours"):
            np.save(path, value)
    return value


def budget(run: Run, budgets: Sequence[int]) -> None:
    """The paper's experiment: how many requests a KV memory holds, and tokens a second of all of
    them; our caches only.
    """
    systems = [name for name in run.systems if name in OURS_BUDGET]
    for context in run.contexts:
        prompt, reasons = run.texts[PROMPT_TEXT][:context], None
        for mib in budgets:
            labels = {"context": context, "memory MiB": mib}
            if run.late("budget", labels, systems):
                continue
            reasons = _prefilled(run, prompt, systems) if reasons is None else reasons
            able = [name for name in systems if name not in reasons]
            fits = {
                name: int(run.once(name, "fits", f"{mib}MiB", run.steps).value) for name in able
            }
            none = {name: "no request fits" for name in able if not fits[name]}
            able = [name for name in able if fits[name]]
            calls = {name: ("decode", (fits[name], run.steps, f"{mib}MiB")) for name in able}
            found = reasons | none | run.in_turns(calls.__getitem__, able)
            for name, replies in found.items():
                if isinstance(replies, str):
                    run.add("budget", labels, name, [], {}, replies)
                    continue
                seconds, facts = _decoded(replies, run.steps)
                facts |= {"requests": fits[name], "shares": run.once(name, "shares").value}
                run.add(
                    "budget", labels, name, [fits[name] * run.steps / s for s in seconds], facts
                )
            print(f"budget {labels}: {fits}", flush=True)
