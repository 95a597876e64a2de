"""Quality of compressed caches on a real model: KL, top-1 agreement and perplexity against the full
cache, at allocated bytes.

`python -m benchmarks quality` runs SmolLM2 on three texts; every policy sees the same 4,096 tokens
of context and is then fed the next 256 one at a time, while it goes on compressing.
"""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np

import diffkv_jax as dkv
from benchmarks.common.smollm2 import smollm2_gguf
from diffkv_jax.evaluation import Quality, quality, teacher_forced
from diffkv_jax.models import load_pretrained
from diffkv_jax.testing.texts import TEXTS, text_tokens

EXACT = dkv.Exact()  # keys and values as the papers have them
POLICIES = {
    "K8V4": dkv.quantized("K8V4", transform=EXACT),
    "alpha (0.5, 0)": dkv.diffkv(0.5, 0.0, transform=EXACT),
    "alpha (1, 0)": dkv.diffkv(1.0, 0.0, transform=EXACT),
    "alpha (3, 0)": dkv.diffkv(3.0, 0.0, transform=EXACT),
    "alpha (1, 0.02)": dkv.diffkv(1.0, 0.02, transform=EXACT),
    "alpha (1, 0.1)": dkv.diffkv(1.0, 0.1, transform=EXACT),
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One policy on one text; `of_bf16` and `logical_of_bf16` are bytes as a fraction of a plain
    bfloat16 cache.
    """

    policy: str
    text: str
    of_bf16: float
    logical_of_bf16: float
    high: float
    low: float
    recent: float
    dropped: float
    mean_kl: float
    p99_kl: float
    top1: float
    perplexity_full: float
    perplexity: float


def lines_of(
    policy: str, texts: list[str], report: dkv.MemoryReport, measured: Quality
) -> list[Line]:
    """One line a text from a batched run."""
    lines = []
    for row, text in enumerate(texts):
        tokens = report.tokens[:, row].sum(axis=(0, 1))
        seen = tokens.sum() + report.dropped[:, row].sum()
        high, low = tokens[0], tokens[1] if len(tokens) == 3 else 0
        lines.append(
            Line(
                policy,
                text,
                of_bf16=float(report.allocated_bytes[:, row].sum() / report.bf16_bytes[row]),
                logical_of_bf16=float(report.logical_bytes[:, row].sum() / report.bf16_bytes[row]),
                high=float(high / seen),
                low=float(low / seen),
                recent=float(tokens[-1] / seen),
                dropped=float(report.dropped[:, row].sum() / seen),
                mean_kl=float(measured.kl[row].mean()),
                p99_kl=float(np.quantile(measured.kl[row], 0.99)),
                top1=float(measured.top1[row].mean()),
                perplexity_full=float(measured.perplexity_full[row]),
                perplexity=float(measured.perplexity[row]),
            )
        )
    return lines


def measure(
    context: int = 4096,
    steps: int = 256,
    texts: tuple[str, ...] = TEXTS,
    policies=None,
    chunk: int = 4096,
) -> list[Line]:
    """Run every policy on all texts as one batch; progress bars on stderr."""
    model, params, tokenizer = load_pretrained(smollm2_gguf(), "float32")
    tokens = text_tokens(tokenizer, list(texts), context + steps + 1)
    run = {"cache_dtype": "bfloat16", "prefill_chunk": chunk}
    full, _ = teacher_forced(
        model,
        params,
        tokens[:, :-1],
        context,
        dkv.CompressionPolicy.none(),
        progress="full cache",
        **run,
    )
    lines = []
    for name, policy in (policies or POLICIES).items():
        compressed, cache = teacher_forced(
            model, params, tokens[:, :-1], context, policy, progress=name, **run
        )
        report = dkv.memory_report(cache)
        measured = quality(full, compressed, tokens[:, context + 1 :])
        lines += lines_of(name, list(texts), report, measured)
    return lines


def markdown(lines: list[Line]) -> str:
    """The lines as a Markdown table."""
    rows = [
        "| policy | text | allocated of bf16 | logical | high / low / recent / dropped | mean KL "
        "| p99 KL | top-1 | perplexity (full) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for x in lines:
        kept = f"{x.high:.2f} / {x.low:.2f} / {x.recent:.2f} / {x.dropped:.2f}"
        rows.append(
            f"| {x.policy} | {x.text} | {x.of_bf16:.3f} | {x.logical_of_bf16:.3f} | {kept} | "
            f"{x.mean_kl:.4f} | "
            f"{x.p99_kl:.3f} | {x.top1:.3f} | {x.perplexity:.3f} ({x.perplexity_full:.3f}) |"
        )
    return "\n".join(rows)


def main(
    context: int = 4096, steps: int = 256, chunk: int = 4096, json_out: Path | None = None
) -> None:
    """Print KL, top-1 and perplexity of a few policies; --json-out FILE keeps the numbers."""
    began = time.time()
    lines = measure(context, steps, chunk=chunk)
    print(markdown(lines))
    print(
        f"{context} tokens of context, {steps} fed, prompt chunks of {chunk}; "
        f"{time.time() - began:.0f} s"
    )
    if json_out is not None:
        json_out.write_text(json.dumps([dataclasses.asdict(x) for x in lines], indent=1))
