"""What a user installs: one top-level name, every folder, importable from anywhere."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAPPED = {"diffkv_jax.models": "models", "diffkv_jax.pallas_kernels": "pallas_kernels"}
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def _package_folders() -> dict[str, Path]:
    """Import name -> folder of every folder that holds Python files."""
    found = {}
    for name, top in {"diffkv_jax": "diffkv_jax", **MAPPED}.items():
        for folder, subfolders, files in os.walk(ROOT / top):  # does not walk the two links
            subfolders[:] = [s for s in subfolders if s != "__pycache__"]
            if any(f.endswith(".py") for f in files):
                parts = Path(folder).relative_to(ROOT / top).parts
                found[".".join((name, *parts))] = Path(folder)
    return found


def _source_files() -> list[Path]:
    tops = ("diffkv_jax", "models", "pallas_kernels", "scripts", "tests")
    return [
        Path(folder) / f
        for top in tops
        for folder, _, files in os.walk(ROOT / top)
        for f in files
        if f.endswith(".py")
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that no stale build/ leaks into it and nothing is written to
    the checkout.
    """
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("diffkv_jax", "models", "pallas_kernels"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = tmp.glob("*.whl")
    return path


def test_packages_list_equals_the_folders():
    assert sorted(SETUPTOOLS["packages"]) == sorted(_package_folders())
    assert SETUPTOOLS["package-dir"] == MAPPED


def test_every_package_has_an_init():
    assert [
        str(f.relative_to(ROOT))
        for f in _package_folders().values()
        if not (f / "__init__.py").is_file()
    ] == []


@pytest.mark.parametrize("folder", MAPPED.values())
def test_links_are_relative(folder):
    link = ROOT / "diffkv_jax" / folder
    if not link.is_symlink():
        pytest.skip("a copy without symlinks; the wheel does not need them")
    assert os.readlink(link) == f"../{folder}"
    assert link.resolve() == (ROOT / folder).resolve()


def test_nothing_imports_the_mapped_folders_by_their_folder_name():
    """Ruff's TID251 cannot tell `from .llama` in models/ from `from models.llama`, so absolute
    imports are checked here.
    """
    wrong = []
    for path in _source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            wrong += [
                f"{path.relative_to(ROOT)}: {n}"
                for n in names
                if n.split(".")[0] in MAPPED.values()
            ]
    assert wrong == []


def test_wheel_has_one_top_level_name_and_every_file(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"diffkv_jax"}
    for package, folder in _package_folders().items():
        for file in folder.glob("*.py"):
            assert f"{package.replace('.', '/')}/{file.name}" in names
    assert {"diffkv_jax/py.typed", "diffkv_jax/server/page.html"} <= set(names)
    for file in (ROOT / "diffkv_jax/calibration/text").iterdir():
        assert f"diffkv_jax/calibration/text/{file.name}" in names


def test_wheel_imports_from_an_empty_directory(wheel, tmp_path):
    unpacked, empty = tmp_path / "unpacked", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(unpacked)
    empty.mkdir()
    (empty / "models").mkdir()  # a user's own folder of that name must not matter
    modules = sorted(SETUPTOOLS["packages"])
    if find_spec("starlette") is None:
        modules.remove("diffkv_jax.server")  # of the extra `serve`
    code = f"import importlib\nfor m in {modules!r}: print(importlib.import_module(m).__file__)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    files = ran.stdout.split()
    assert len(files) == len(modules) and all(f.startswith(str(unpacked)) for f in files), files
