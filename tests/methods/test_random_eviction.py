"""Random eviction: how many tokens, which, and the same in every run."""

import pytest
from tiny_llama import LENGTH, kept

import diffkv_jax as dkv


@pytest.mark.slow
def test_random_eviction():
    """As many as the budget says, others in each head, evenly spread, and the same in every run."""
    found = kept(dkv.random_eviction(0.5))
    assert found == kept(dkv.random_eviction(0.5), chunk=128)
    free = [
        head - {0, 1, 2, 3} - set(range(LENGTH - 64, LENGTH)) for layer in found for head in layer
    ]
    assert all(len(head) == LENGTH // 2 - 68 for head in free)
    assert max(len(a & b) for i, a in enumerate(free) for b in free[:i]) < 60  # 29 by chance
    early = sum(at < 120 for head in free for at in head)  # 116 of 232 places
    assert abs(early - 4 * 82) < 50
