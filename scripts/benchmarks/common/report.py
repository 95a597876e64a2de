"""Tables of `kernels` and `gpu`: rows that are measured one by one under a time budget, printed
by rich and written as JSON.
"""

import datetime
import importlib.metadata
import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
OK, FAILED, LATE = "ok", "FAILED", "skipped (time)"
_logger = logging.getLogger("benchmarks")


@dataclass
class Section:
    """One table.

    Attributes:
        columns: header to format spec of its values ("" prints them as they are).
        seconds: no row is begun later than this after the section's first one.
        notes: printed under the table.
    """

    title: str
    columns: Mapping[str, str]
    seconds: float
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    began: float | None = None

    def measure(self, labels: Row, function: Callable[[], Row | list[Row]]) -> bool:
        """Add the row (or rows) that `function` gives, led by `labels`; one that is late or raises
        is a row that says so.

        Returns whether there is a result that is not a failed comparison.
        """
        self.began = self.began or time.perf_counter()
        if time.perf_counter() - self.began > self.seconds:
            return self._add(labels | {"status": LATE})
        try:
            found = function()
        except (
            Exception
        ) as error:  # a kernel that does not compile must not cost the rest of the table
            _logger.debug("%s", labels, exc_info=True)
            return self._add(
                labels | {"status": f"{FAILED}: {type(error).__name__}: {first_line(error)}"}
            )
        return all(
            [
                self._add(labels | {"status": OK} | row)
                for row in ([found] if isinstance(found, dict) else found)
            ]
        )

    def _add(self, row: Row) -> bool:
        self.rows.append(row)
        return row["status"] == OK

    @property
    def failed(self) -> bool:
        """Whether a row could not be measured or is wrong."""
        return any(row["status"].startswith(FAILED) for row in self.rows)

    def table(self) -> Table:
        """The rows; status as last column only where some row is not fine."""
        headers = [
            *self.columns,
            *(
                ["status"]
                if any(row["status"] != OK for row in self.rows) or "status" in self.columns
                else []
            ),
        ]
        headers = list(dict.fromkeys(headers))
        table = Table(
            *headers,
            title=self.title,
            title_justify="left",
            caption="\n".join(self.notes) or None,
            caption_justify="left",
        )
        for row in self.rows:
            table.add_row(
                *(_shown(row.get(header), self.columns.get(header, "")) for header in headers)
            )
        return table


def _shown(value: Any, spec: str) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, str) else format(value, spec)


def first_line(error: BaseException, width: int = 160) -> str:
    """The beginning of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:width] if lines else ""


def command_line() -> str:
    """How this process was started: `python -m benchmarks` with its arguments."""
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])


def circumstances() -> dict[str, str]:
    """What a reader needs to know about the run: device, driver, versions, date, commit,
    command.
    """
    device = jax.devices()[0]
    return {
        "device": f"{device.device_kind} x {jax.device_count()}",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device.platform == "gpu"
        else "none",
        "platform version": getattr(device.client, "platform_version", "unknown")
        .replace("\n", " ")
        .strip(),
        "jax": f"{jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}, Python "
        f"{sys.version.split()[0]}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _output("git", "describe", "--always", "--dirty"),
        "command": command_line(),
    }


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().replace("\n", ", ") or "unknown"


def print_section(console: Console, section: Section) -> None:
    """The table and an empty line."""
    console.print(section.table())
    console.print()


def write_json(path: Path, facts: Mapping[str, Any], sections: Mapping[str, Section]) -> None:
    """Everything that was measured, unrounded."""
    tables = {
        name: {"title": s.title, "rows": s.rows, "notes": s.notes} for name, s in sections.items()
    }
    path.write_text(
        json.dumps({**facts, "sections": tables}, indent=1, default=float) + "\n", encoding="utf-8"
    )
