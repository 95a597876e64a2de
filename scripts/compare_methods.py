"""Every method at about 50, 25 and 12 % of a bf16 cache's bytes: quality against the full cache, and passkey recall.

`python scripts/compare_methods.py --out folder` runs SmolLM2 and writes methods.csv, methods.md and, with matplotlib, methods.svg.
Exact evictors keep a share of the tokens (L2 norm also layers 0 and 1 whole); those with quantised tiers keep as many more as their
tokens are smaller. Codecs alone and DiffKV's thresholds have no target: their rows stand where they come out.
"""

import csv
import importlib.util
import re
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import typer

import diffkv_jax as dkv
import needle
import quality
from diffkv_jax.pallas_kernels.codecs import KVFormat

SHARES = (0.5, 0.25, 0.12)
HEAD_DIM, SIDE_BYTES = 64, 6
EXACT = {
    "random": dkv.random_eviction,
    "StreamingLLM": dkv.streaming_llm,
    "L2 norm": dkv.key_norm,
    "KeyDiff": dkv.key_difference,
    "H2O": dkv.h2o,
    "TOVA": dkv.tova,
    "SnapKV": dkv.snapkv,
    "PyramidKV": dkv.pyramidkv,
    "Ada-KV(SnapKV)": lambda keep, **options: dkv.ada_kv(dkv.snapkv(keep, **options)),
}
QUANTISED = (("SnapKV", "K4V4"), ("L2 norm", "K8V4"), ("Ada-KV(SnapKV)", "K4V4"))
AS_THEY_COME = {
    **{f"{codec}{' rotated' * turn}": dkv.quantized(codec, rotate=turn) for codec in ("K8V4", "K4V4", "K4V2") for turn in (False, True)},
    "DiffKV (0.5, 0)": dkv.diffkv(0.5, 0.0),
    "DiffKV (1, 0)": dkv.diffkv(1.0, 0.0),
    "DiffKV (1, 0) rotated": dkv.diffkv(1.0, 0.0, rotate=True),
    "DiffKV (1, 0.02)": dkv.diffkv(1.0, 0.02),
    "DiffKV (1, 0.1)": dkv.diffkv(1.0, 0.1),
}


class Row(NamedTuple):
    """One method at one size: its quality, and passkeys found, None when none was asked for."""

    method: str
    target: float | None
    line: quality.Line
    passkeys: int | None


def size_of(codec: str) -> float:
    """Bytes of a token, its position and score included, as a share of bf16."""
    return (KVFormat.parse(codec, "bfloat16").token_bytes(HEAD_DIM) + SIDE_BYTES) / (4 * HEAD_DIM)


def policies() -> dict[tuple[str, float | None], dkv.CompressionPolicy]:
    """What is compared, by method and target."""
    compared: dict[tuple[str, float | None], dkv.CompressionPolicy] = {(name, None): policy for name, policy in AS_THEY_COME.items()}
    for share in SHARES:
        for name, method in EXACT.items():
            compared[name, share] = method(share)
        for name, codec in QUANTISED:
            if (keep := share / size_of(codec)) <= 1:
                compared[f"{name} + {codec}", share] = EXACT[name](keep, tiers=(codec,))
    return compared


def measure(context: int, steps: int, text: str, recall_context: int, depths: int, pattern: str) -> list[Row]:
    """One row a policy; progress on stderr."""
    compared = {f"{name} @ {share}" if share else name: (name, share) for name, share in policies() if re.search(pattern, name)}
    by_label = {label: policies()[key] for label, key in compared.items()}
    lines = quality.measure(context, steps, (text,), by_label, chunk=1024)
    found = needle.recall(recall_context, depths, by_label) if depths else {}
    rows = [Row(*compared[line.policy], line, sum(found[line.policy]) if found else None) for line in lines]
    return sorted(rows, key=lambda row: (-(row.target or row.line.of_bf16), row.line.mean_kl))


def markdown(rows: list[Row], depths: int) -> str:
    """The rows as a Markdown table; passkeys of those asked at `depths`."""
    lines = [
        "| method | target | bytes of bf16 | dropped | perplexity (full) | mean KL | top-1 | passkey |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, target, x, passkeys in rows:
        passkey = "" if passkeys is None else f"{passkeys} of {depths}"
        lines.append(
            f"| {name} | {target or ''} | {x.of_bf16:.3f} | {x.dropped:.2f} | {x.perplexity:.3f} ({x.perplexity_full:.3f}) | "
            f"{x.mean_kl:.4f} | {x.top1:.3f} | {passkey} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """KL against bytes, a line a method."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    plt = importlib.import_module("matplotlib.pyplot")
    figure, panel = plt.subplots(figsize=(8, 5))
    for name in dict.fromkeys(row.method.partition(" (")[0] for row in rows):
        points = sorted((row.line.of_bf16, row.line.mean_kl) for row in rows if row.method.partition(" (")[0] == name)
        panel.plot(*zip(*points, strict=True), "o-", label=name)
    panel.set(xlabel="allocated bytes of a bf16 cache", ylabel="mean KL to the full cache", yscale="log")
    panel.legend(fontsize=7)
    figure.savefig(path, bbox_inches="tight")


def main(
    context: int = 4096,
    steps: int = 128,
    text: str = "king_james",
    recall_context: int = 2048,
    depths: int = typer.Option(10, help="passkeys asked for; 0 leaves the recall out"),
    methods: str = typer.Option("", help="a regular expression that the names match"),
    out: Path | None = typer.Option(None, help="folder for methods.csv, methods.md and methods.svg"),  # noqa: B008
) -> None:
    """Print the table."""
    names = sorted({name for name, _ in policies()})
    if not any(re.search(methods, name) for name in names):
        raise typer.BadParameter(f"--methods {methods} matches none of {', '.join(names)}")
    rows = measure(context, steps, text, recall_context, depths, methods)
    table = markdown(rows, depths)
    print(table)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    numbers = [{"method": row.method, "target": row.target, "passkeys": row.passkeys} | asdict(row.line) for row in rows]
    with (out / "methods.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(numbers[0]))
        writer.writeheader()
        writer.writerows(numbers)
    (out / "methods.md").write_text(table + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib"):
        plot(rows, out / "methods.svg")


if __name__ == "__main__":
    typer.run(main)
