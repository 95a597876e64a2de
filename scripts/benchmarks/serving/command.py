"""Throughput and latency of many requests under a fixed KV memory, ours beside transformers'."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common.report import circumstances
from benchmarks.common.smollm2 import smollm2_gguf
from benchmarks.serving.measured import Run
from benchmarks.serving.ours import serve
from benchmarks.serving.workload import arrivals
from diffkv_jax.evaluation.policies import policy_of
from diffkv_jax.models import load_pretrained
from diffkv_jax.units import parse_bytes

POLICIES = ["none", "quantized('K8V4')", "diffkv(1.0, 0.0)", "diffkv(1.0, 0.02)"]
TRANSFORMERS = "transformers generate_batch"


def main(
    model: Path | None = None,
    budget: str = "256MiB",
    policy: Annotated[list[str] | None, typer.Option(help=f"default: {POLICIES}")] = None,
    slots: Annotated[list[int] | None, typer.Option(help="max_requests of each policy")] = None,
    requests: Annotated[int, typer.Option(help="for each slot")] = 2,
    problems: Annotated[Path | None, typer.Option(help="GSM8K or MATH-500, JSON lines")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="of documents, without --problems")] = 2048,
    new_tokens: int = 1024,
    max_len: int = 4096,
    prefill_chunk: int = 256,
    rate: Annotated[float | None, typer.Option(help="arrivals a second; else all at once")] = None,
    count: Annotated[int | None, typer.Option(help="requests in all, for --rate")] = None,
    rounds: Annotated[int, typer.Option(help="every system once a round")] = 1,
    peer: Annotated[bool, typer.Option(help=f"{TRANSFORMERS} too")] = False,
) -> None:
    """Print a Markdown table; times in milliseconds. Every request generates all its tokens."""
    gguf = model or smollm2_gguf()
    loaded = load_pretrained(gguf, progress=False)
    names = policy or POLICIES
    widths = slots or [32] * len(names)
    if len(widths) != len(names):
        raise typer.BadParameter(f"--slots {widths} must be given for each of {names}")
    facts = circumstances()
    print(f"{facts['device']}, JAX {facts['jax']}, {facts['date']}, commit {facts['commit']}")
    print(f"{facts['command']}\n")
    how = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "problems": problems}
    header = False
    for _ in range(rounds):
        for name, width in zip(names, widths, strict=True):
            load = arrivals(loaded[2], count or requests * width, **how, rate=rate)
            options = {"max_requests": width, "max_len": max_len, "prefill_chunk": prefill_chunk}
            run = serve(loaded, policy_of(name), load, memory_budget=budget, **options)
            header = _print_row(name, len(load), run, header)
        if peer:
            from benchmarks.serving import peers

            load = arrivals(loaded[2], count or 2 * requests, **how, rate=rate)
            with tempfile.TemporaryDirectory() as work:
                run = peers.serve(Path(gguf), Path(work), load, parse_bytes(budget))
            header = _print_row(TRANSFORMERS, len(load), run, header)


def _print_row(name: str, count: int, run: Run, header: bool) -> bool:
    row = run.row()
    if not header:
        print("| cache | requests | " + " | ".join(row) + " |")
        print("|---" * (len(row) + 2) + "|")
    print(
        f"| {name} | {count} | " + " | ".join(f"{x:.4g}" for x in row.values()) + " |", flush=True
    )
    return True
