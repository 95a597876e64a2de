"""What `benchmarks peers` has measured: one JSON file that runs add to, ratios with their spread,
and Markdown tables.

Each entry has a key, `section|...|system`, and belongs to a run. Only entries of one run, measured
in turns, are ever divided by each other, round by round; where a system and the baseline come from
different runs the table shows no ratio.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

OK = "ok"


@dataclass(frozen=True)
class Entry:
    """One measurement of one system.

    Attributes:
        labels: what it is a measurement of, in the order of the table's first columns: context,
            batch, text, ...
        samples: one number a round of what the section compares (see `Section.unit`); empty where
            it is not a timing.
        facts: everything else.
        status: "ok", or the reason why there is no result.
    """

    section: str
    labels: dict[str, Any]
    system: str
    run: str
    samples: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    status: str = OK

    @property
    def key(self) -> str:
        """The name under which a later measurement of the same replaces it."""
        return "|".join(
            [self.section, *(f"{name}={value}" for name, value in self.labels.items()), self.system]
        )

    @property
    def median(self) -> float:
        """Median of the samples."""
        return float(np.median(self.samples))


@dataclass(frozen=True)
class Ratio:
    """Median, least and largest of the rounds' ratios."""

    median: float
    least: float
    largest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.largest:.2f})"


def ratio(entry: Entry, baseline: Entry | None) -> Ratio | None:
    """Of the samples, round by round; None unless both are of one run and complete."""
    if (
        baseline is None
        or entry.run != baseline.run
        or not entry.samples
        or len(entry.samples) != len(baseline.samples)
    ):
        return None
    rounds = np.asarray(entry.samples) / np.asarray(baseline.samples)
    return Ratio(float(np.median(rounds)), float(rounds.min()), float(rounds.max()))


class Results:
    """Entries by key and circumstances by run; kept in a file where one is given."""

    def __init__(self, path: Path | None = None):
        self.path, self.runs, self.entries = path, {}, {}
        if path is not None and path.exists():
            data = json.loads(path.read_text(encoding="utf-8"))
            self.runs: dict[str, Any] = data["runs"]
            self.entries: dict[str, Entry] = {
                key: Entry(**entry) for key, entry in data["entries"].items()
            }

    def add(self, entry: Entry) -> None:
        """Replace what is there under this key, unless a failure would replace a result; write the
        file.
        """
        old = self.entries.get(entry.key)
        if old is None or entry.status == OK or old.status != OK:
            self.entries[entry.key] = entry
        self.save()

    def save(self) -> None:
        """Write the file whole, so that a run that is stopped leaves a readable one. Runs that no
        entry refers to are left out.
        """
        if self.path is None:
            return
        used = {entry.run for entry in self.entries.values()}
        data = {
            "runs": {run: facts for run, facts in self.runs.items() if run in used},
            "entries": {key: asdict(entry) for key, entry in self.entries.items()},
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1, default=float) + "\n", encoding="utf-8")
        partial.replace(self.path)

    def of(self, section: str) -> list[Entry]:
        """The entries of a section, cell by cell."""
        return sorted(
            (e for e in self.entries.values() if e.section == section),
            key=lambda e: [_sortable(v) for v in e.labels.values()],
        )

    def baseline_of(self, entry: Entry, name: str) -> Entry | None:
        """The entry of system `name` in the same cell."""
        found = self.entries.get(Entry(entry.section, entry.labels, name, "").key)
        return found if found is not None and found.status == OK else None


def _sortable(value: Any) -> tuple[int, Any]:
    return (1, value) if isinstance(value, str) else (0, value)


@dataclass(frozen=True)
class Section:
    """How a section is shown: what its samples are and how to print each fact."""

    title: str
    unit: str | None
    facts: Mapping[str, str]
    sample: str = ".1f"


SECTIONS = {
    "decode": Section(
        "Decode",
        "tokens/s",
        {"ms a step": ".1f", "KV MiB": ".1f", "KV bytes a token": ".0f", "peak MiB": ".0f"},
    ),
    "prefill": Section("Prefill", "tokens/s", {"first token s": ".2f", "peak MiB": ".0f"}, ".0f"),
    "quality": Section(
        "Quality, teacher-forced",
        None,
        {
            "perplexity": ".3f",
            "KL to float32": ".4f",
            "KL to own full cache": ".4f",
            "same top token": ".3f",
        },
    ),
    "budget": Section(
        "Throughput in a fixed KV memory",
        "tokens/s",
        {"requests": "d", "KV MiB": ".0f", "ms a step": ".0f", "peak MiB": ".0f"},
    ),
    "attention": Section(
        "Decode attention of one layer",
        "calls/s",
        {"ms": ".3f", "MB read": ".1f", "GB/s": ".2f", "of bandwidth": ".0%"},
        ".1f",
    ),
}


def table(
    results: Results, section: str, titles: Mapping[str, str], baselines: Sequence[str]
) -> str:
    """The section as Markdown, a column of ratios for each baseline; "" when it is empty."""
    entries, shown = results.of(section), SECTIONS[section]
    if not entries:
        return ""
    order = {name: i for i, name in enumerate(titles)}
    entries.sort(
        key=lambda e: ([_sortable(v) for v in e.labels.values()], order.get(e.system, len(order)))
    )
    timed = [name for name in baselines if shown.unit and any(e.system == name for e in entries)]
    columns = [
        *entries[0].labels,
        "system",
        *([f"{shown.unit} (least to largest)"] if shown.unit else []),
        *shown.facts,
    ]
    columns += [f"of {titles.get(name, name)}" for name in timed]
    lines = [f"### {shown.title}", "", _line(columns), _line(["---"] * len(columns))]
    for entry in entries:
        cells = [*map(str, entry.labels.values()), titles.get(entry.system, entry.system)]
        if entry.status != OK:
            lines.append(
                _line([*cells, f"none: {entry.status}", *[""] * (len(columns) - len(cells) - 1)])
            )
            continue
        if shown.unit:
            low, high = min(entry.samples), max(entry.samples)
            cells.append(
                f"{entry.median:{shown.sample}} ({low:{shown.sample}} to {high:{shown.sample}})"
            )
        cells += [
            "" if (value := entry.facts.get(name)) is None else format(value, spec)
            for name, spec in shown.facts.items()
        ]
        cells += [
            str(ratio(entry, results.baseline_of(entry, name)) or "other run") for name in timed
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
