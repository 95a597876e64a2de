"""Sizes that can be read in one go: no file over 350 lines, no Python function over 60."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("diffkv_jax", "models", "pallas_kernels", "scripts", "tests")
SUFFIXES = {".py", ".cc", ".cpp", ".h", ".hpp"}


def too_long(path: Path) -> list[str]:
    """The file, and its functions from `def` to the last line, with their lines where too many."""
    name, source = path.relative_to(ROOT), path.read_text(encoding="utf-8")
    sizes = [(str(name), len(source.split("\n")) - 1, 350)]
    for node in ast.walk(ast.parse(source)) if path.suffix == ".py" else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            sizes.append((f"{name}: {node.name}", lines, 60))
    return [f"{what}: {lines} lines, at most {most}" for what, lines, most in sizes if lines > most]


def test_no_file_and_no_function_is_too_long():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    sources = [path for path in files if path.suffix in SUFFIXES]
    assert {path.suffix for path in sources} >= {".py", ".cc", ".h"}
    found = [line for path in sources for line in too_long(path)]
    assert not found, "\n".join(found)
