"""What `compare.py` measures of one policy on SmolLM2: quality against the full cache,
passkey recall, decode speed.
"""

import csv
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import diffkv_jax as dkv
from benchmarks.common.smollm2 import smollm2_gguf
from benchmarks.methods import needle, quality
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.models import load_pretrained
from diffkv_jax.testing.texts import text_tokens


@dataclass(frozen=True)
class Row:
    """One method at one size; None = not measured. `of_bf16` is allocated bytes as a share of a
    plain bfloat16 cache.
    """

    method: str
    target: float | None
    of_bf16: float | None = None
    dropped: float | None = None
    perplexity_full: float | None = None
    perplexity: float | None = None
    mean_kl: float | None = None
    top1: float | None = None
    passkeys: float | None = None
    tokens_per_second: float | None = None


class Yardstick:
    """The real model, a text, and the full cache's answer to it."""

    def __init__(self, context: int, steps: int, text: str):
        self.model, self.params, self.tokenizer = load_pretrained(smollm2_gguf(), "float32")
        assert self.tokenizer is not None  # a GGUF file carries one
        self.context, self.text = context, text
        self.tokens = text_tokens(self.tokenizer, [text], context + steps + 1)
        self._full, self._learned = None, {}

    def _run(self, policy: dkv.CompressionPolicy) -> dict[str, Any]:
        """How a policy is run: prompts in chunks of 1,024 where it takes chunks."""
        return {
            "cache_dtype": "bfloat16",
            "prefill_chunk": _chunk(policy, self.context),
            **self._learning(policy),
        }

    def _learning(self, policy: dkv.CompressionPolicy) -> dict[str, Any]:
        """The calibration of a policy whose codecs learn, from another text than it is measured
        on.
        """
        if not any(fmt.learned for fmt in policy.formats("bfloat16")):
            return {}
        if policy.tiers not in self._learned:
            tokens = text_tokens(self.tokenizer, ["hamlet"], 4 * 512).reshape(4, 512)
            self._learned[policy.tiers] = dkv.calibrate(
                self.model, self.params, tokens, policy, samples=1024, iterations=12
            )
        return {"calibration": self._learned[policy.tiers]}

    def quality(self, row: Row, policy: dkv.CompressionPolicy) -> Row:
        """`row` with bytes, perplexity, KL and top-1 of feeding what follows the context."""
        fed = self.tokens[:, :-1], self.context
        if self._full is None:
            full = dkv.CompressionPolicy.none()
            self._full, _ = teacher_forced(self.model, self.params, *fed, full, **self._run(full))
        log_probs, cache = teacher_forced(
            self.model, self.params, *fed, policy, **self._run(policy)
        )
        measured = quality.quality(self._full, log_probs, self.tokens[:, self.context + 1 :])
        (line,) = quality.lines_of(row.method, [self.text], dkv.memory_report(cache), measured)
        both = {field.name for field in fields(quality.Line)} & {
            field.name for field in fields(Row)
        }
        return replace(row, **{name: getattr(line, name) for name in both})

    def recall(self, row: Row, policy: dkv.CompressionPolicy, context: int, depths: int) -> Row:
        """`row` with how many of `depths` passkeys are found in `context` tokens."""
        prompts, chunk = needle.prompts(self.tokenizer, context, depths), _chunk(policy, context)
        found = needle.found(
            self.model,
            self.params,
            self.tokenizer,
            prompts,
            policy,
            chunk,
            **self._learning(policy),
        )
        return replace(row, passkeys=sum(found))

    def speed(self, row: Row, policy: dkv.CompressionPolicy, count: int = 64) -> Row:
        """`row` with tokens a second of one request behind the context: the better of two runs of
        `count`, compiled before.
        """
        prompt, seconds = self.tokens[:, : self.context], []
        fresh = {"policy": policy, "max_len": self.context + 4 * count, **self._run(policy)}
        out = dkv.generate(self.model, self.params, prompt, max_new_tokens=1, **fresh)
        for _ in range(3):
            began = time.perf_counter()
            if _in_one_chunk(policy):  # takes no second prompt
                out = dkv.generate(self.model, self.params, prompt, max_new_tokens=count, **fresh)
            else:
                out = dkv.generate(
                    self.model, self.params, prompt[:, :1], cache=out.cache, max_new_tokens=count
                )
            seconds.append(time.perf_counter() - began - out.prefill_seconds)
        return replace(row, tokens_per_second=count / min(seconds[1:]))


def _in_one_chunk(policy: dkv.CompressionPolicy) -> bool:
    """Whether tokens are dropped before they are encoded in blocks."""
    return policy.group is not None and policy.score is not None


def _chunk(policy: dkv.CompressionPolicy, context: int) -> int:
    """Tokens of a prompt at a time."""
    return context if _in_one_chunk(policy) else 1024


def read(path: Path) -> dict[tuple[str, float | None], Row]:
    """The rows that an earlier run wrote, by method and target; none where there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            Row(line.pop("method"), **{k: float(v) if v else None for k, v in line.items()})
            for line in csv.DictReader(file)
        ]
    return {(row.method, row.target): row for row in rows}


def write(path: Path, rows: list[Row]) -> None:
    """The rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def markdown(rows: list[Row], depths: int) -> str:
    """The rows as a Markdown table; passkeys of those asked at `depths`."""
    lines = [
        "| method | target | bytes of bf16 | dropped | perplexity (full) | mean KL | top-1 | "
        "passkey | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(value: float | None, form: str, more: str = "") -> str:
        return "" if value is None else f"{value:{form}}{more}"

    for x in rows:
        cells = [
            x.method,
            cell(x.target, "g"),
            cell(x.of_bf16, ".3f"),
            cell(x.dropped, ".2f"),
            cell(x.perplexity, ".3f", f" ({cell(x.perplexity_full, '.3f')})"),
            cell(x.mean_kl, ".4f"),
            cell(x.top1, ".3f"),
            cell(x.passkeys, ".0f", f" of {depths}"),
            cell(x.tokens_per_second, ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_order(rows: dict[tuple[str, float | None], Row]) -> list[Row]:
    """By target (rows without one by their own bytes), the largest first, then by KL."""
    return sorted(
        rows.values(),
        key=lambda row: (-(row.target or np.nan_to_num(row.of_bf16 or 0)), row.mean_kl or 0),
    )
