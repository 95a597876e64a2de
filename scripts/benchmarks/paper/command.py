"""What a model says to each claim of DiffKV's paper (docs/paper.md)."""

import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common.report import circumstances
from benchmarks.common.smollm2 import smollm2_gguf
from benchmarks.paper.claims import CLAIMS
from benchmarks.paper.setting import Setting
from diffkv_jax.models import load_pretrained


def main(
    model: Path | None = None,
    context: int = 1024,
    claim: Annotated[list[str] | None, typer.Option(help=f"of {[*CLAIMS]}; all when none")] = None,
) -> None:
    """Print a Markdown table for each claim; --model is a GGUF file or a folder, else SmolLM2."""
    if unknown := [one for one in claim or () if one not in CLAIMS]:
        raise typer.BadParameter(f"claim {unknown[0]!r} must be one of {[*CLAIMS]}")
    loaded = load_pretrained(model or smollm2_gguf())
    setting = Setting(*loaded, context)
    facts = circumstances()
    print(f"{facts['device']}, JAX {facts['jax']}, {facts['date']}, commit {facts['commit']}\n")
    for name in claim or CLAIMS:
        began = time.time()
        print(
            f"## {name}\n\n{CLAIMS[name](setting)}\n\n({time.time() - began:.0f} s)\n", flush=True
        )
