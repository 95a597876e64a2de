"""Ahead-of-time compilation for chips that are not here. `make test-compile` installs what it needs
and runs these; see CONTRIBUTING.md.
"""

import platform

import jax
import pytest

from benchmarks.roofline import chips  # first: sets the environment that the compilers read

CHIPS = ("H100", "A100", "L40", "v5e", "v6e")

jax.config.update("jax_enable_compilation_cache", False)  # a cached program dumps no PTX


@pytest.fixture(params=CHIPS)
def chip(request) -> chips.Chip:
    """A chip whose compiler is installed. Skips where no packages for this machine exist, fails
    where they are just missing.
    """
    chip = chips.CHIPS[request.param]
    missing = chips.missing_packages(chip.platform)
    if missing and (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip(
            f"no compiler for {chip.name} on {platform.system()} {platform.machine()}: "
            f"{missing} exist for Linux x86_64 only"
        )
    assert not missing, f"{missing} are not installed: run `make test-compile`, which installs them"
    return chip
