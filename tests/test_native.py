"""Native kernels are built once, and where they cannot be built plain XLA runs and says so."""

import logging
import shutil
from pathlib import Path

import pytest

from diffkv_jax.pallas_kernels import kernels, native
from diffkv_jax.pallas_kernels.kernels import Kernels

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nothing found out yet about compilers, an empty cache."""
    monkeypatch.setenv("DIFFKV_JAX_CACHE", str(tmp_path / "cache"))
    cached = (native._toolchain, native.library, kernels._no_native_kernels)
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
    assert [record.message for record in caplog.records if "no-such-compiler" in record.message] == [caplog.records[0].message]
    with pytest.raises(ValueError, match="no-such-compiler.*set CXX"):
        Kernels.resolve("cpu")


def test_a_compiler_that_fails_is_named(fresh, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    fresh.setenv("CXX", str(broken))
    assert "out of order" in (native.why_unavailable() or "")


@needs_compiler
def test_a_library_is_built_once_and_again_when_the_flags_change(fresh, tmp_path):
    native.library("append")
    (built,) = (tmp_path / "cache").iterdir()
    before = built.stat()
    native.library.cache_clear()
    native.library("append")
    assert built.stat() == before
    native.library.cache_clear()
    native._toolchain.cache_clear()
    fresh.setenv("DIFFKV_JAX_CXXFLAGS", "-O1")
    native.library("append")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@needs_compiler
def test_the_default_on_a_cpu():
    assert Kernels.resolve() == Kernels("cpu")
