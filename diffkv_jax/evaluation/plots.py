"""Plots of results, where matplotlib is installed: KL against bytes, needles, tokens kept."""

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np

from diffkv_jax.evaluation.on_texts import OnTexts
from diffkv_jax.evaluation.result import TaskResult
from diffkv_jax.evaluation.run import Results

LEFT_OUT = "matplotlib is not installed, so no plots were drawn: pip install 'diffkv-jax[eval]'"


def draw(folder: Path, found: Results) -> list[Path]:
    """Write the plots that the results have something for into `folder`; their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(LEFT_OUT)
    importlib.import_module("matplotlib").use("svg")
    plt = importlib.import_module("matplotlib.pyplot")
    figures = {}
    if found.on_texts:
        figures["pareto"] = _pareto(plt, found.on_texts)
    for name, one in found.on_texts.items():
        figures[f"kept_{_slug(name)}"] = _kept(plt, name, one)
    for name, results in {"full cache": found.full, **found.tasks}.items():
        if "needle" in results:
            figures[f"needle_{_slug(name)}"] = _needle(plt, name, results["needle"])
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.svg")
        figure.savefig(paths[-1], bbox_inches="tight")
        plt.close(figure)
    return paths


def _slug(name: str) -> str:
    """A policy's name for the name of a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("_")


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of (bytes, KL) that no other has fewer of both, the fewest bytes first."""
    front: list[tuple[float, float]] = []
    for size, kl in sorted(points):
        if not front or kl < front[-1][1]:
            front.append((size, kl))
    return front


def _pareto(plt: Any, found: dict[str, OnTexts]) -> Any:
    """Mean KL with its error against bytes; the broad line joins what no other beats in both."""
    figure, panel = plt.subplots(figsize=(7, 4.5))
    points = []
    for name, one in found.items():
        share, kl = one.report.allocated / one.report.bf16, one.quality.summary().mean_kl
        points.append((share, kl.value))
        panel.errorbar(share, kl.value, yerr=np.nan_to_num(kl.error), fmt="o", label=name)
    panel.plot(*zip(*pareto(points), strict=True), color="0.85", linewidth=6, zorder=0)
    low = min((kl for _, kl in points), default=0)
    panel.set(
        xlabel="allocated bytes, share of a bf16 cache",
        ylabel="mean KL to the full cache",
        yscale="log" if low > 0 else "linear",
    )
    panel.legend(fontsize=7)
    return figure


def _kept(plt: Any, name: str, one: OnTexts) -> Any:
    """Share of the tokens that each head of each layer holds, a panel for each tier and for all."""
    parts = one.kept
    layers, heads = parts["held"].shape
    size = (1.5 + (0.5 + 0.3 * heads) * len(parts), 1.5 + 0.2 * layers)
    figure, panels = plt.subplots(1, len(parts), figsize=size, sharey=True, layout="constrained")
    images = [
        panel.imshow(share, vmin=0, vmax=1, aspect="auto", origin="lower")
        for panel, share in zip(panels, parts.values(), strict=True)
    ]
    for panel, part in zip(panels, parts, strict=True):
        panel.set(xlabel="KV head", title=part)
        panel.set_xticks(range(heads))
    panels[0].set_ylabel("layer")
    figure.suptitle(name)
    figure.colorbar(images[-1], ax=panels, label="share of the tokens seen")
    return figure


def _needle(plt: Any, name: str, one: TaskResult) -> Any:
    """Found or not, over depth and length."""
    depths = sorted({row["depth"] for row in one.details})
    lengths = sorted({row["length"] for row in one.details})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for row, score in zip(one.details, one.scores, strict=True):
        grid[depths.index(row["depth"]), lengths.index(row["length"])] = score
    figure, panel = plt.subplots(figsize=(2 + 0.6 * len(lengths), 1.5 + 0.35 * len(depths)))
    panel.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
    panel.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    panel.set(xlabel="tokens of the prompt", ylabel="depth of the passkey", title=name)
    return figure
