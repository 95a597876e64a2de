"""README.md and CONTRIBUTING.md as pages of the site (a hook of mkdocs.yml): their links, and links
to them, are those of the repository.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, their links turned from the root's to those of docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=linked(text, "](")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page to the files at the root."""
    return linked(markdown, "](" + "../" * (page.file.src_uri.count("/") + 1))


def linked(text: str, before: str) -> str:
    """`text` with links to the pages' names, where `before` stands before the file's."""
    for source, page in PAGES.items():
        text = text.replace(f"{before}{source}", f"{before.removesuffix('../')}{page}")
    return text
