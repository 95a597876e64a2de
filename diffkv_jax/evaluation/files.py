"""Files that a task reads: JSON lines, compressed or not, with the fields that it needs."""

import gzip
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from diffkv_jax.arguments import file_path, refuse


def existing_file(name: str, path: str | PathLike[str]) -> Path:
    """The path of a file that is there.

    Raises:
        TypeError, ValueError: there is no file at `path`.
    """
    found = file_path(name, path)
    if not found.is_file():
        there = "and that is a folder" if found.is_dir() else "and there is none"
        refuse(name, str(path), f"a file that is there, {there}: check the path")
    return found


def read_text(name: str, path: str | PathLike[str]) -> str:
    """The UTF-8 text of a file.

    Raises:
        TypeError, ValueError: there is no such file, or it is no text.
    """
    found = existing_file(name, path)
    try:
        return found.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        refuse(name, str(path), f"a file with UTF-8 text ({error})")


def read_lines(
    name: str, path: str | PathLike[str], fields: Sequence[str], count: int | None
) -> list[dict[str, Any]]:
    """The first `count` objects (None: all) of a .jsonl or .jsonl.gz file; each has `fields`.

    Raises:
        TypeError, ValueError: there is no such file, it has fewer lines, or one is no object with
            these fields.
    """
    found = existing_file(name, path)
    rule = f"JSON lines, each an object with {list(fields)}"
    rows = []
    opened = gzip.open if found.suffix == ".gz" else open
    try:
        with opened(found, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if count is not None and len(rows) == count:
                    break
                row = json.loads(line)
                if not isinstance(row, dict) or any(field not in row for field in fields):
                    refuse(name, str(path), f"{rule}; line {number} is not")
                rows.append(row)
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        refuse(name, str(path), f"{rule} ({error})")
    if not rows or (count is not None and len(rows) < count):
        rule = f"a file of at least {count or 1} problems; it has {len(rows)}"
        refuse(name, str(path), f"{rule}: ask for fewer")
    return rows
