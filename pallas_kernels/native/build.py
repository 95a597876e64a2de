"""Native CPU kernels: C++ built on first use with the system's compiler, called through XLA's
foreign function interface.

Each operation's `cpu.cc` (with the headers beside it and in `native/`) becomes one shared library
in a cache directory, keyed by all that the machine code depends on: the sources, the compiler, the
flags, what `-march=native` means on this CPU, and jaxlib's headers.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
from filelock import FileLock, Timeout

from ..once import once

HEADERS = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
)
LOCK_SECONDS = 600.0  # to wait for another process's build, which takes one minute at most

_log = logging.getLogger(__name__)


class Unavailable(RuntimeError):
    """There is no compiler, it cannot build the kernels, or there is no place for them."""


def why_unavailable() -> str | None:
    """None where native kernels are built or can be, else the reason."""
    try:
        _toolchain()
        if not all(_place(operation).exists() for operation in _operations()):
            _check_writable(cache_directory())
    except Unavailable as error:
        return str(error)
    return None


def build_all() -> None:
    """Build every library that is missing, before its first use; nothing where it cannot be."""
    if why_unavailable() is None:
        for operation in _operations():
            library(operation)


def call(operation: str, target: str, *outputs, aliases: dict[int, int] | None = None):
    """A function that calls the handler `target` of an operation's library on arrays; attributes
    are its keyword arguments.

    Args:
        operation: the folder that holds cpu.cc.
        outputs: `jax.ShapeDtypeStruct` of each result.
        aliases: result that takes over the memory of an operand, `{operand: result}`.
    """
    _register(operation, target)
    return jax.ffi.ffi_call(
        f"diffkv_jax.{target}", outputs, input_output_aliases=aliases, vmap_method="sequential"
    )


@once
def _register(operation: str, target: str) -> None:
    handler = getattr(library(operation), target)
    jax.ffi.register_ffi_target(f"diffkv_jax.{target}", jax.ffi.pycapsule(handler), platform="cpu")


@once
def library(operation: str) -> ctypes.CDLL:
    """The operation's library, built unless the cache has it."""
    built = _place(operation)
    if not built.exists():
        _build(_source(operation), built)
    return ctypes.CDLL(str(built))


def _operations() -> list[str]:
    return sorted(source.parent.name for source in HEADERS.parent.glob("*/cpu.cc"))


def _source(operation: str) -> Path:
    return HEADERS.parent / operation / "cpu.cc"


def _place(operation: str) -> Path:
    """Where the operation's built library lies: its name depends on all that its code does."""
    source = _source(operation)
    sources = [source, *sorted(source.parent.glob("*.h")), *sorted(HEADERS.glob("*.h"))]
    parts = [_toolchain().identity, *(path.read_text() for path in sources)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return cache_directory() / f"{operation}-{key}.so"


def cache_directory() -> Path:
    """Where built libraries lie: $DIFFKV_JAX_CACHE, else diffkv_jax in the user's cache folder."""
    given = os.environ.get("DIFFKV_JAX_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffkv_jax"


def _check_writable(directory: Path) -> None:
    """
    Raises:
        Unavailable: no file can be made in the directory; names it and the remedy.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise Unavailable(
            f"built kernels cannot be kept in {directory} ({error}); set DIFFKV_JAX_CACHE to "
            "another folder"
        ) from error


def _build(source: Path, built: Path) -> None:
    """Build a library unless another process does: then wait for that one, whose lock ends with it,
    however it ends.

    Raises:
        Unavailable: the compiler fails, nothing can be written, or the other process takes longer
            than `LOCK_SECONDS`.
    """
    _check_writable(built.parent)
    lock = built.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=LOCK_SECONDS):
            if not built.exists():
                _log.info("building the native kernels of %s into %s", source.parent.name, built)
                _compile(source, built)
            lock.unlink(missing_ok=True)  # still held, and whoever waits for it finds the library
    except Timeout as error:
        raise Unavailable(
            f"{lock} has been held for {LOCK_SECONDS:g} s: end the process that builds, remove the "
            "file if there is none, or set DIFFKV_JAX_CACHE to another folder"
        ) from error


def _compile(source: Path, built: Path) -> None:
    """Compile into a temporary file, then move it: nobody sees half a library, locks or not."""
    handle, temporary = tempfile.mkstemp(dir=built.parent, suffix=".so")
    os.close(handle)
    try:
        _run([_toolchain().compiler, *_flags(), str(source), "-o", temporary])
        os.replace(temporary, built)
    finally:
        Path(temporary).unlink(missing_ok=True)


class _Toolchain:
    """A compiler that works, and all that its output depends on beside the sources."""

    def __init__(self, compiler: str):
        self.compiler = compiler
        described = _run([compiler, "--version"])
        # what -march=native stands for on this CPU
        macros = _run([compiler, *_flags(), "-dM", "-E", "-x", "c++", os.devnull])
        self.identity = "\0".join([compiler, described, macros, *_flags(), version("jaxlib")])


@once
def _toolchain() -> _Toolchain:
    wanted = os.environ.get("CXX")
    compiler = (
        shutil.which(wanted)
        if wanted
        else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    )
    if compiler is None:
        raise Unavailable(
            f"no C++ compiler was found ({wanted or 'g++, clang++, c++'}); install one or set CXX"
        )
    return _Toolchain(compiler)


def _flags() -> tuple[str, ...]:
    extra = os.environ.get("DIFFKV_JAX_CXXFLAGS", "").split()  # such as -fsanitize=address
    return (*FLAGS, *extra, f"-I{HEADERS}", f"-I{jax.ffi.include_dir()}")


def _run(command: list[str]) -> str:
    """Standard output of a command.

    Raises:
        Unavailable: it fails; with what it wrote.
    """
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(
            f"{' '.join(command)} failed: {getattr(error, 'stderr', '') or error}"
        ) from error
