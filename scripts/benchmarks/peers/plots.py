"""Plots of what `benchmarks peers` has measured, one file a section; needs matplotlib."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.results import OK, Entry, Results


def write_all(results: Results, titles: Mapping[str, str], folder: Path) -> list[Path]:
    """Write the plots of the sections that have entries."""
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    plt = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in {"decode": decode, "quality": quality, "budget": budget}.items():
        entries = [entry for entry in results.of(name) if entry.status == OK]
        if not entries:
            continue
        figure = draw(plt, entries, results, titles)
        path = folder / f"benchmark-{name}.svg"
        figure.savefig(path, bbox_inches="tight")
        plt.close(figure)
        written.append(path)
    return written


def decode(plt: Any, entries: list[Entry], results: Results, titles: Mapping[str, str]) -> Any:
    """Tokens a second of every system, a panel for each context and batch; whiskers from least to
    largest.
    """
    del results
    cells = list(dict.fromkeys(tuple(entry.labels.items()) for entry in entries))
    figure, panels = plt.subplots(
        1,
        len(cells),
        figsize=(3.2 * len(cells) + 2, 0.3 * len(titles) + 1.5),
        sharey=True,
        squeeze=False,
    )
    order = [name for name in titles if any(entry.system == name for entry in entries)][::-1]
    for panel, cell in zip(panels[0], cells, strict=True):
        found = {entry.system: entry for entry in entries if tuple(entry.labels.items()) == cell}
        for row, name in enumerate(order):
            if (entry := found.get(name)) is not None:
                middle = entry.median
                spread = [[middle - min(entry.samples)], [max(entry.samples) - middle]]
                panel.barh(
                    row,
                    middle,
                    xerr=spread,
                    color="tab:blue" if name.startswith("ours") else "tab:gray",
                )
        panel.set_title(", ".join(f"{name} {value}" for name, value in cell), fontsize=9)
        panel.set_xlabel("tokens/s")
    panels[0][0].set_yticks(range(len(order)), [titles[name] for name in order], fontsize=8)
    return figure


def quality(plt: Any, entries: list[Entry], results: Results, titles: Mapping[str, str]) -> Any:
    """KL to a system's own full cache against its KV bytes a token, which come from the largest
    decode cell.
    """
    texts = list(dict.fromkeys(entry.labels["text"] for entry in entries))
    nbytes = {e.system: e.facts["KV bytes a token"] for e in results.of("decode") if e.status == OK}
    figure, panels = plt.subplots(
        1, len(texts), figsize=(4 * len(texts), 3.5), sharey=True, squeeze=False
    )
    for panel, text in zip(panels[0], texts, strict=True):
        for entry in entries:
            kl = entry.facts.get("KL to own full cache")
            if entry.labels["text"] == text and kl is not None and entry.system in nbytes:
                panel.plot(
                    nbytes[entry.system],
                    kl,
                    "o",
                    color="tab:blue" if entry.system.startswith("ours") else "tab:gray",
                )
                panel.annotate(titles[entry.system], (nbytes[entry.system], kl), fontsize=6)
        panel.set(title=text, xlabel="KV bytes a token", yscale="log")
    panels[0][0].set_ylabel("mean KL to own full cache, nats")
    return figure


def budget(plt: Any, entries: list[Entry], results: Results, titles: Mapping[str, str]) -> Any:
    """Tokens a second against the KV memory, a panel for each context."""
    del results
    contexts = list(dict.fromkeys(entry.labels["context"] for entry in entries))
    figure, panels = plt.subplots(1, len(contexts), figsize=(4 * len(contexts), 3.5), squeeze=False)
    for panel, context in zip(panels[0], contexts, strict=True):
        for name in titles:
            line = [
                entry
                for entry in entries
                if entry.system == name and entry.labels["context"] == context
            ]
            if line:
                line.sort(key=lambda entry: entry.facts["KV MiB"])
                panel.plot(
                    [e.facts["KV MiB"] for e in line],
                    [e.median for e in line],
                    "o-",
                    label=titles[name],
                )
        panel.set(title=f"context {context}", xlabel="KV MiB", ylabel="tokens/s of all requests")
        panel.legend(fontsize=7)
    return figure
