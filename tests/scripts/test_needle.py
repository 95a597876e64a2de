"""A passkey hidden in a long context is found by the compressed cache wherever the full cache finds
it.
"""

import pytest

from benchmarks.methods import needle
from helpers_model import smollm2_gguf_path

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.optimized]


def test_passkey_recall():
    smollm2_gguf_path()  # skips, with the reason, where the model's package is missing
    found = needle.recall(
        4096, 10, {name: needle.POLICIES[name] for name in ("full", "alpha (1, 0)")}
    )
    assert sum(found["full"]) >= 5
    lost = [
        i for i, (full, held) in enumerate(zip(*found.values(), strict=True)) if full and not held
    ]
    assert not lost, f"depths {lost} are answered by the full cache only"
