"""Results as one JSON file and as Markdown tables."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from diffkv_jax.evaluation.asked import Asked
from diffkv_jax.evaluation.divergence import Estimate, Summary
from diffkv_jax.evaluation.on_texts import OnTexts
from diffkv_jax.evaluation.result import TaskResult
from diffkv_jax.evaluation.run import Results

NOTE = (
    "± is one standard error: of a text over blocks of 16 neighbouring positions, of all texts "
    "over the texts, of a task over its problems (differences: problem by problem). Bytes are "
    "allocated ones, as a share of a plain bfloat16 cache."
)


def write_json(path: Path, facts: Mapping[str, Any], asked: Asked, found: Results) -> None:
    """Everything that was measured, unrounded, with the facts of the run."""
    policies = {name: json.loads(policy.to_json()) for name, policy in found.policies.items()}
    whole = {**facts, "arguments": asked.arguments, "policies": policies}
    whole["kl"] = [row for one in found.on_texts.items() for row in _kl_rows(found.texts, *one)]
    whole["kept"] = {name: one.kept for name, one in found.on_texts.items()}
    whole["tasks"] = [
        *(_task_row("full cache", one, None) for one in found.full.values()),
        *(
            _task_row(name, one, found.full.get(one.task))
            for name, results in found.tasks.items()
            for one in results.values()
        ),
    ]
    whole["failed"] = found.failed
    path.write_text(json.dumps(whole, indent=1, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def summaries(texts: tuple[str, ...], one: OnTexts) -> list[tuple[str, float, Summary]]:
    """Each text's name, share of bytes and figures; where there are several, all of them last."""
    found = [
        (text, float(one.of_bf16[row]), one.quality.text(row).summary())
        for row, text in enumerate(texts)
    ]
    if len(texts) > 1:
        share = float(one.report.allocated / one.report.bf16)
        found.append(("all texts", share, one.quality.summary("texts")))
    return found


def _kl_rows(texts: tuple[str, ...], name: str, one: OnTexts) -> list[dict[str, Any]]:
    rows = []
    for text, share, summary in summaries(texts, one):
        figures = {part.name: getattr(summary, part.name) for part in fields(summary)}
        pairs = {
            key: _pair(value) if isinstance(value, Estimate) else value
            for key, value in figures.items()
        }
        rows.append({"policy": name, "text": text, "of_bf16": share, **pairs})
    return rows


def _task_row(name: str, one: TaskResult, full: TaskResult | None) -> dict[str, Any]:
    row = {"policy": name, "task": one.task, "of_bf16": one.of_bf16, "score": _pair(one.score)}
    if full is not None:
        row["difference"] = _pair(one.against(full))
    parts = zip(one.scores.tolist(), one.answers, one.expected, one.details, strict=True)
    names = ("score", "answer", "expected", "details")
    return {**row, "problems": [dict(zip(names, part, strict=True)) for part in parts]}


def _pair(found: Estimate) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {"value": found.value, "error": None if np.isnan(found.error) else found.error}


def markdown(facts: Mapping[str, Any], found: Results) -> str:
    """The tables, with what a reader needs to know about the run under them."""
    parts = []
    if found.on_texts:
        parts.append(_kl_table(found))
    if found.tasks:
        parts.append(_task_table(found))
    failures = [
        f"- `{name}`, {task}: {error}"
        for name, tasks in found.failed.items()
        for task, error in tasks.items()
    ]
    if failures:
        parts.append("\n".join(["Not measured:", "", *failures]))
    model, hardware, versions = facts["model"], facts["hardware"], facts["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts.append(
        f"{model['name']} ({model['dtype']}, fingerprint {model['fingerprint'][:12]}); "
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['device']}; {known}; "
        f"{facts['date']}. {NOTE}"
    )
    return "\n\n".join(parts) + "\n"


def _kl_table(found: Results) -> str:
    lines = [
        "| policy | text | of bf16 | mean KL | p99 KL | top-1 | perplexity | full cache |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.on_texts.items():
        for text, share, figures in summaries(found.texts, one):
            lines.append(
                f"| `{name}` | {text} | {share:.3f} | {figures.mean_kl:.4f} | "
                f"{figures.p99_kl:.3f} | {figures.top1:.3f} | {figures.perplexity:.2f} | "
                f"{figures.perplexity_full:.2f} |"
            )
    return "\n".join(lines)


def _task_table(found: Results) -> str:
    lines = [
        "| policy | task | problems | of bf16 | score | full cache | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in found.tasks.items():
        for task, one in results.items():
            full = found.full[task]
            lines.append(
                f"| `{name}` | {task} | {len(one.scores)} | {one.of_bf16:.3f} | {one.score:.3f} | "
                f"{full.score:.3f} | {one.against(full):+.3f} |"
            )
    return "\n".join(lines)
