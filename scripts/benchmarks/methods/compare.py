"""Every method at about 50, 25 and 12 % of a bf16 cache's bytes: quality against the full cache,
passkey recall and decode speed.

`python -m benchmarks methods --out folder` runs SmolLM2 and writes methods.csv, methods.md
and, with matplotlib, methods.svg; a run that is cut off goes on where it stopped.
Exact evictors keep a share of the tokens (L2 norm also layers 0 and 1 whole); those with quantised
tiers keep as many more as their tokens are smaller. Codecs alone, DiffKV's thresholds and FastGen
have no target: their rows stand where they come out.
"""

import dataclasses
import importlib.util
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import typer
from tqdm.auto import tqdm

import diffkv_jax as dkv
from benchmarks.common.smollm2 import smollm2_gguf
from benchmarks.methods.measure import Row, Yardstick, in_order, markdown, read, write
from diffkv_jax.evaluation.plots import pareto
from diffkv_jax.models.gguf_source import GGUFSource
from diffkv_jax.pallas_kernels.codecs import KVFormat

OUT = Path("comparison")
SHARES = (0.5, 0.25, 0.12)
RECOVERED = (0.95, 0.8, 0.6)  # of each head's attention, by FastGen
HEAD_DIM, SIDE_BYTES = 64, 6


def kvzip(keep: float, **options: Any) -> dkv.CompressionPolicy:
    """KVzip in the words that its authors ask for a repetition in."""
    return dkv.kvzip(keep, replay=dkv.replay_words(smollm2_tokenizer()), **options)


@lru_cache
def smollm2_tokenizer() -> Any:
    """The tokenizer of SmolLM2's file."""
    return GGUFSource(smollm2_gguf()).tokenizer()


EXACT = {
    "random": dkv.random_eviction,
    "StreamingLLM": dkv.streaming_llm,
    "L2 norm": dkv.key_norm,
    "KeyDiff": dkv.key_difference,
    "H2O": dkv.h2o,
    "TOVA": dkv.tova,
    "SnapKV": dkv.snapkv,
    "PyramidKV": dkv.pyramidkv,
    "PyramidInfer": dkv.pyramidinfer,
    "Ada-KV(SnapKV)": lambda keep, **options: dkv.ada_kv(dkv.snapkv(keep, **options)),
    "ExpectedAttention": dkv.expected_attention,
    "Ada-KV(ExpectedAttention)": lambda keep, **options: dkv.ada_kv(
        dkv.expected_attention(keep, **options)
    ),
    "KVzip": kvzip,
}
QUANTISED = (
    ("SnapKV", "K4V4"),
    ("SnapKV", "K4cV4g32"),  # KIVI's
    ("L2 norm", "K8V4"),
    ("Ada-KV(SnapKV)", "K4V4"),
    ("Ada-KV(ExpectedAttention)", "K4V4"),
    ("KVzip", "K4V4"),
)
AS_THEY_COME = {
    "full cache": dkv.CompressionPolicy.none(),
    **{
        f"{codec}{' rotated' * turn}": dkv.quantized(
            codec, transform=dkv.Hadamard() if turn else dkv.Exact()
        )
        for codec in ("K8V4", "K4V4", "K4V2")
        for turn in (False, True)
    },
    **{f"TurboQuant {bits} bit": dkv.turboquant(bits) for bits in (4, 2)},
    "DiffKV (0.5, 0)": dkv.diffkv(0.5, 0.0),
    "DiffKV (1, 0)": dkv.diffkv(1.0, 0.0),
    "DiffKV (1, 0) rotated": dkv.diffkv(1.0, 0.0, transform=dkv.Hadamard()),
    "DiffKV (1, 0) K8V4 + K4nV2n rotated": dkv.diffkv(
        1.0, 0.0, tiers=("K8V4", "K4nV2n"), transform=dkv.Hadamard()
    ),
    "DiffKV (1, 0) K4nV4n + K2nV2n rotated": dkv.diffkv(
        1.0, 0.0, tiers=("K4nV4n", "K2nV2n"), transform=dkv.Hadamard()
    ),
    "DiffKV (1, 0.02)": dkv.diffkv(1.0, 0.02),
    "DiffKV (1, 0.02) K8V4 + K4nV2n rotated": dkv.load_policy("diffkv_rotated"),
    "DiffKV (1, 0.1)": dkv.diffkv(1.0, 0.1),
    **{f"KIVI {bits} bit": dkv.kivi(bits) for bits in (4, 2)},
    **{f"GEAR {bits} bit": dkv.gear(bits) for bits in (4, 2)},
    **{f"CQ {channels}c8b": dkv.coupled_quantization(channels) for channels in (2, 4, 8)},
    **{f"KVQuant {bits} bit, a sink": dkv.kvquant(bits, sinks=1) for bits in (4, 2)},
    "KVQuant with CQ keys": dkv.load_policy("kvquant_with_cq_keys"),
    "MiniCache": dkv.minicache(),
    "MiniCache + K4V4": dkv.minicache(inner="K4V4"),
    "MiniCache + DiffKV (1, 0.02)": dkv.load_policy("diffkv_minicache"),
}


def size_of(codec: str) -> float:
    """Bytes of a token, its position and score included, as a share of bf16."""
    return (
        KVFormat.parse(codec, "bfloat16").for_block(HEAD_DIM, 32).token_bytes(HEAD_DIM) + SIDE_BYTES
    ) / (4 * HEAD_DIM)


@lru_cache
def smollm2_classes() -> dkv.TokenClasses:
    """The token ids that FastGen's heads may keep."""
    return dkv.token_classes(smollm2_tokenizer())


def policies() -> dict[tuple[str, float | None], dkv.CompressionPolicy]:
    """What is compared, by method and target."""
    compared: dict[tuple[str, float | None], dkv.CompressionPolicy] = {
        (name, None): policy for name, policy in AS_THEY_COME.items()
    }
    special, punctuation = smollm2_classes()
    for recover in RECOVERED:
        compared[f"FastGen ({recover})", None] = dkv.fastgen(
            recover, protect=special, punctuation=punctuation
        )
    for share in SHARES:
        for name, method in EXACT.items():
            compared[name, share] = method(share)
        for name, codec in QUANTISED:
            if (keep := share / size_of(codec)) <= 1:
                compared[f"{name} + {codec}", share] = EXACT[name](keep, tiers=(codec,))
    return {key: _as_published(policy) for key, policy in compared.items()}


def _as_published(policy: dkv.CompressionPolicy) -> dkv.CompressionPolicy:
    """Without the library's own transform, which no paper has."""
    usual = isinstance(policy.transform, dkv.Usual)
    return dataclasses.replace(policy, transform=dkv.Exact()) if usual else policy


def plot(rows: list[Row], path: Path) -> None:
    """KL against bytes, a line a method; the broad line joins those that no other beats in both."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    plt = importlib.import_module("matplotlib.pyplot")
    figure, panel = plt.subplots(figsize=(8, 5))
    families = defaultdict(list)
    for row in rows:
        if row.of_bf16 and row.mean_kl:
            families[re.split(r" \(| \d", row.method)[0]].append((row.of_bf16, row.mean_kl))
    for i, (name, points) in enumerate(families.items()):
        panel.plot(
            *zip(*sorted(points), strict=True),
            "osd^v"[i // 10 % 5] + "-",
            label=name,
            markersize=4,
            linewidth=0.8,
        )
    front = pareto([point for points in families.values() for point in points])
    panel.plot(*zip(*front, strict=True), color="0.85", linewidth=6, zorder=0)
    panel.set(
        xlabel="allocated bytes, share of a bf16 cache",
        ylabel="mean KL to the full cache",
        yscale="log",
    )
    panel.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, bbox_inches="tight")


def main(
    context: int = 4096,
    steps: int = 128,
    text: str = "king_james",
    recall_context: int = 4096,
    depths: int = typer.Option(10, help="passkeys asked for; 0 leaves the recall out"),
    speed: bool = typer.Option(True, help="time decoding too: stop other work"),
    quality: bool = typer.Option(True, help="KL, top-1 and perplexity"),
    methods: str = typer.Option("", help="a regular expression that the names match"),
    out: Path = typer.Option(OUT, help="folder for methods.csv, .md and .svg"),  # noqa: B008
) -> None:
    """Measure every method at equal bytes, and print the table. What methods.csv holds already is
    not measured again.
    """
    compared = {key: policy for key, policy in policies().items() if re.search(methods, key[0])}
    if not compared:
        names = ", ".join(sorted({name for name, _ in policies()}))
        raise typer.BadParameter(f"--methods {methods} matches none of {names}")
    rows, yardstick = read(out / "methods.csv"), Yardstick(context, steps, text)
    for key, policy in tqdm(compared.items(), unit=" policies"):
        # programs of many policies exceed Linux' limit of memory maps, and the process aborts
        jax.clear_caches()
        row, policy = rows.get(key) or Row(*key), dataclasses.replace(policy, name=key[0])
        if quality and row.mean_kl is None:
            row = yardstick.quality(row, policy)
        if depths and row.passkeys is None:
            row = yardstick.recall(row, policy, recall_context, depths)
        if speed and row.tokens_per_second is None:
            row = yardstick.speed(row, policy)
        rows[key] = row
        write(out / "methods.csv", in_order(rows))
    table = markdown(in_order(rows), depths)
    print(table)
    (out / "methods.md").write_text(table + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib"):
        plot(in_order(rows), out / "methods.svg")
