"""Native kernels are built once, and where they cannot be built plain XLA runs and says so."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest
from filelock import FileLock

from diffkv_jax.pallas_kernels import dispatch
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native import build

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nothing found out yet about compilers, an empty cache."""
    monkeypatch.setenv("DIFFKV_JAX_CACHE", str(tmp_path / "cache"))
    cached = (build._toolchain, build.library, build._register, dispatch._no_native_kernels)
    for function in cached:
        function.cache_clear()
    yield monkeypatch
    for function in cached:
        function.cache_clear()


def test_without_a_compiler_xla_runs_and_the_log_says_why(fresh, caplog):
    fresh.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        assert Kernels.resolve() == Kernels("xla")
        Kernels.resolve()
    assert [
        record.message for record in caplog.records if "no-such-compiler" in record.message
    ] == [caplog.records[0].message]
    with pytest.raises(ValueError, match="no-such-compiler.*set CXX"):
        Kernels.resolve("cpu")


def test_a_compiler_that_fails_is_named(fresh, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    fresh.setenv("CXX", str(broken))
    assert "out of order" in (build.why_unavailable() or "")


@needs_compiler
def test_a_library_is_built_once_and_again_when_the_flags_change(fresh, tmp_path):
    build.library("recent_window")
    (built,) = (tmp_path / "cache").iterdir()
    before = built.stat()
    build.library.cache_clear()
    build.library("recent_window")
    assert built.stat() == before
    build.library.cache_clear()
    build._toolchain.cache_clear()
    fresh.setenv("DIFFKV_JAX_CXXFLAGS", "-O1")
    build.library("recent_window")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@needs_compiler
def test_the_default_on_a_cpu():
    assert Kernels.resolve() == Kernels("cpu")


@pytest.fixture
def counted(fresh, tmp_path: Path):
    """A compiler that notes each library that it builds, and takes its time; gives the names of
    what it has built.
    """
    calls = tmp_path / "calls"
    calls.touch()
    compiler = tmp_path / "slow-c++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*cpu.cc*) echo "$*" >> {calls}; sleep '
        f'0.5;; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    fresh.setenv("DIFFKV_JAX_CXXFLAGS", "-O0")
    return lambda: [
        Path(next(word for word in line.split() if word.endswith("cpu.cc"))).parent.name
        for line in calls.read_text().splitlines()
    ]


@needs_compiler
def test_threads_build_and_register_once(counted, monkeypatch: pytest.MonkeyPatch):
    threads, registered = 6, []
    start = threading.Barrier(threads)
    monkeypatch.setattr(
        jax.ffi, "register_ffi_target", lambda name, *rest, **options: registered.append(name)
    )

    def first_use(_):
        start.wait()
        build._register("recent_window", "append_recent_cpu")
        return build.library("recent_window")

    with ThreadPoolExecutor(threads) as pool:
        libraries = set(map(id, pool.map(first_use, range(threads))))
    assert (
        counted() == ["recent_window"]
        and len(libraries) == 1
        and registered == ["diffkv_jax.append_recent_cpu"]
    )


@pytest.mark.slow
@needs_compiler
def test_processes_build_once(counted, tmp_path: Path):
    program = (
        "from diffkv_jax.pallas_kernels.native import build; "
        "print(build.library('recent_window')._name)"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        "JAX_PLATFORMS": "cpu",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    names = {process.communicate(timeout=120)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0] and len(names) == 1
    assert counted() == ["recent_window"]
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


@needs_compiler
def test_the_lock_of_a_process_that_died_is_no_obstacle(counted, tmp_path: Path):
    place = build._place("recent_window")
    place.parent.mkdir()
    place.with_suffix(".lock").write_text("left behind")
    build.library("recent_window")
    assert counted() == ["recent_window"]


@needs_compiler
def test_a_build_that_takes_too_long_is_named(counted, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "LOCK_SECONDS", 0.1)
    lock = build._place("recent_window").with_suffix(".lock")
    lock.parent.mkdir()
    with (
        FileLock(lock),
        pytest.raises(build.Unavailable, match=f"{lock} has been held for 0.1 s.*DIFFKV_JAX_CACHE"),
    ):
        build.library("recent_window")
    assert counted() == []


@needs_compiler
def test_where_nothing_can_be_written_xla_runs_and_the_log_says_why(fresh, tmp_path: Path, caplog):
    (tmp_path / "file").touch()
    fresh.setenv("DIFFKV_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert Kernels.resolve() == Kernels("xla")
    assert "file/cache" in caplog.text and "set DIFFKV_JAX_CACHE" in caplog.text
    with pytest.raises(ValueError, match="set DIFFKV_JAX_CACHE"):
        Kernels.resolve("cpu")


@needs_compiler
def test_built_libraries_are_used_where_nothing_can_be_written(fresh, tmp_path: Path):
    operations = sorted(path.parent.name for path in build.HEADERS.parent.glob("*/cpu.cc"))
    for operation in operations:
        place = build._place(operation)
        place.parent.mkdir(exist_ok=True)
        place.touch()
    fresh.setattr(build, "_check_writable", lambda directory: pytest.fail(f"asks for {directory}"))
    assert build.why_unavailable() is None and len(operations) >= 6


@needs_compiler
def test_all_libraries_are_built_ahead(fresh):
    built = []
    fresh.setattr(build, "library", built.append)
    build.build_all()
    assert {"decode_attention", "prefill_attention", "linear"} < set(built)
    fresh.setattr(build, "why_unavailable", lambda: "no compiler")
    built.clear()
    build.build_all()
    assert not built
