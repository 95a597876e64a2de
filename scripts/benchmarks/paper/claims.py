"""DiffKV's claims (arXiv 2412.03131), one function each: Markdown of what a model says to them."""

from collections.abc import Callable

import numpy as np

import diffkv_jax as dkv
from benchmarks.paper.setting import Row, Setting
from diffkv_jax.methods.diffkv import MeanAttention
from diffkv_jax.testing.texts import TEXTS, load_text

EXACT = dkv.Exact()
HIGH, LOW = (0.25, 0.5, 1.0, 2.0, 4.0), (0.0, 0.02, 0.05, 0.1, 0.25)
HEADER = "| policy | mean KL | of bf16 | tokens by tier |\n|---|---|---|---|"


def static(keep: float, high: float | None = None, tiers=("K8V8",)) -> dkv.CompressionPolicy:
    """The same score and codecs; every head of every layer keeps the same share."""
    budget = dkv.Budget(keep=keep, keep_high=high)
    score = MeanAttention(queries=64)
    return dkv.CompressionPolicy("static", score=score, keep=budget, tiers=tiers)


def table(rows: list[Row]) -> str:
    return "\n".join([HEADER, *(f"| {row.name} | {row.cells} |" for row in rows)])


def keys_matter_more(setting: Setting) -> str:
    """Keys need more bits than values (sec. 3.1, fig. 2)."""
    rows = []
    for name in ("K8V8", "K8V4", "K4V8", "K8V2", "K2V8", "K4V4", "K4V2", "K2V4"):
        for label, transform in (("as they are", EXACT), ("usual transform", dkv.Usual())):
            rows.append(setting.row(f"{name}, {label}", dkv.quantized(name, transform=transform)))
    return table(rows)


def sparsity_is_dynamic(setting: Setting) -> str:
    """Heads and requests need different shares of their tokens (sec. 3.3, fig. 4): thresholds
    against the same share for all, at equal bytes.
    """
    rows = []
    for alpha in (0.01, 0.03, 0.1):
        dynamic = setting.row(
            f"alpha {alpha}", dkv.diffkv(alpha, alpha, tiers=("K8V8",), forgets=False)
        )
        keep = sum(dynamic.kept)
        rows += [dynamic, setting.row(f"{keep:.2f} of each head", static(keep))]
    return table(rows)


def parts_add_up(setting: Setting) -> str:
    """Keys over values, tokens by significance, heads by need: alone and together (sec. 7.3)."""
    together = setting.row("all three: diffkv(1, 0)", dkv.diffkv(1.0, 0.0))
    high = together.kept[0] + together.kept[-1]
    pruned = setting.row("all three, pruning: diffkv(1, 0.02)", dkv.diffkv(1.0, 0.02))
    return table(
        [
            setting.row("none: K4V4", dkv.quantized("K4V4")),
            setting.row("keys over values: K4V2", dkv.quantized("K4V2")),
            setting.row(
                f"and tokens: {high:.2f} of each head K8V4, the others K4V2",
                static(1.0, high, ("K8V4", "K4V2")),
            ),
            together,
            pruned,
            setting.row(
                "pruning without heads",
                static(sum(pruned.kept), pruned.kept[0] + pruned.kept[-1], ("K8V4", "K4V2")),
            ),
        ]
    )


def thresholds(setting: Setting) -> str:
    """The text depends little on alpha_high and much on alpha_low (sec. 7.2, fig. 9)."""
    found = {
        (high, low): setting.row("", dkv.diffkv(high, low))
        for high in HIGH
        for low in LOW
        if low <= high
    }

    def grid(title: str, cell: Callable[[Row], str]) -> str:
        lines = [f"| {title} | " + " | ".join(f"low {low}" for low in LOW) + " |"]
        lines.append("|---" * (len(LOW) + 1) + "|")
        for high in HIGH:
            cells = (cell(found[high, low]) if (high, low) in found else "" for low in LOW)
            lines.append(f"| high {high} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    kl, share = (
        grid("mean KL", lambda row: f"{row.kl:.4f}"),
        grid("of bf16", lambda row: f"{row.share:.3f}"),
    )
    return f"{kl}\n\n{share}"


def critical_tokens_vary(setting: Setting) -> str:
    """How many tokens matter differs from head to head and from request to request (fig. 3): the
    share of the first tier at alpha 1, [layers, requests, heads].
    """
    found = setting.measured(dkv.diffkv(1.0, 0.0))
    high = found.by_head[..., 0]
    lines = ["| texts | least head | median | most | spread over heads | over requests |"]
    lines.append("|---" * 6 + "|")
    rows = len(high[0]) // len(TEXTS)
    named = [(name, high[:, i * rows : (i + 1) * rows]) for i, name in enumerate(TEXTS)]
    for name, part in [*named, ("all", high)]:
        least, median, most = np.quantile(part.mean(axis=1), (0.0, 0.5, 1.0))
        over_heads, over_requests = part.mean(axis=1).std(), part.std(axis=1).mean()
        lines.append(
            f"| {name} | {least:.3f} | {median:.3f} | {most:.3f} | {over_heads:.3f} | "
            f"{over_requests:.3f} |"
        )
    return "\n".join(lines)


def other_text_than_the_calibration(setting: Setting) -> str:
    """Beside the paper, which learns thresholds alone: the usual transform learned from one text
    and used on another (K4V4).
    """
    policy = dkv.quantized("K4V4")
    given: dict[str, tuple[dkv.CompressionPolicy, dkv.Calibration | None]] = {
        "the built-in text": (policy, None)
    }
    for name in TEXTS:
        text = load_text(name)[200_000:] if name != "hamlet" else load_text(name)[100_000:]
        tokens = np.array(setting.tokenizer(text[:20_000]).input_ids[:4096]).reshape(4, 1024)
        learned = dkv.calibrate(setting.model, setting.params, tokens, policy, progress=False)
        given[name] = (policy, learned)
    given["nothing (no transform)"] = (dkv.quantized("K4V4", transform=EXACT), None)
    lines = ["| learned from | " + " | ".join(f"KL on {name}" for name in TEXTS) + " |"]
    lines.append("|---" * (len(TEXTS) + 1) + "|")
    for name, one in given.items():
        parts = np.split(setting.measured(*one).kl.mean(axis=1), len(TEXTS))
        lines.append(f"| {name} | " + " | ".join(f"{part.mean():.4f}" for part in parts) + " |")
    return "\n".join(lines)


CLAIMS = {
    "keys": keys_matter_more,
    "sparsity": sparsity_is_dynamic,
    "parts": parts_add_up,
    "thresholds": thresholds,
    "critical": critical_tokens_vary,
    "calibration": other_text_than_the_calibration,
}
