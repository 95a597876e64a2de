"""Set-up of every test: the CPU unless JAX_PLATFORMS says otherwise, and compiled programs kept
between runs.
"""

import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("DIFFKV_JAX_CHECK_POLICIES", "0")  # a run of the model for every policy

import jax
import pytest

# A bounded cache is one with file locks: pytest-xdist workers and runs side by side may share it.
jax.config.update("jax_compilation_cache_max_size", 2**30)
jax.config.update(
    "jax_compilation_cache_dir",
    str(Path(__file__).parent.parent / ".pytest_cache" / f"jax-{jax.__version__}"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly(request):
    """On a CPU most of the time of tests would be LLVM's: it optimises only where a module is
    marked `optimized` or `compile`.
    """
    optimized = any(request.node.get_closest_marker(name) for name in ("optimized", "compile"))
    quickly = os.environ["JAX_PLATFORMS"] == "cpu" and not optimized
    if quickly != jax.config.values["jax_disable_most_optimizations"]:
        jax.config.update("jax_disable_most_optimizations", quickly)
        jax.clear_caches()  # of programs compiled the other way


@pytest.fixture
def key() -> jax.Array:
    """A fixed random key; split it rather than use it twice."""
    return jax.random.key(0)


@pytest.fixture(autouse=True)
def _few_mapped_programs():
    """Drops compiled programs before a process has as many memory maps as Linux allows (65,530):
    XLA maps each, and aborts there.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`daily(n)`: every n-th case of a test runs every day, the others are slow. An n that the
    number of implementations does not divide comes round to each of them.
    """
    cases: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("daily")
        if mark is None or item.get_closest_marker("slow"):
            continue
        test = item.nodeid.partition("[")[0]
        if cases[test] % mark.args[0]:
            item.add_marker(pytest.mark.slow)
        cases[test] += 1
