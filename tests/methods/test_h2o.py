"""H2O: the tokens with the largest sums of attention, against kvpress on torch."""

import numpy as np
import pytest
from tiny_llama import LENGTH, PROMPT, half, kept, models

import diffkv_jax as dkv


@pytest.mark.slow
def test_h2o_keeps_the_largest_sums():
    """kvpress' observed attention is the mean over the queries that see a token: times their number
    it is the sum.
    """
    choice = pytest.importorskip("oracles.kvpress_choice")
    theirs, _, _ = models(2, "eager")
    means = choice.scores(
        choice.presses().ObservedAttentionPress(compression_ratio=0.5), theirs, PROMPT
    )
    found = kept(dkv.h2o(0.5, sinks=0, window=1))
    assert found == choice.kept_by_best(
        [mean * np.arange(LENGTH, 0, -1) for mean in means], half, 1
    )
    assert found != choice.kept_by_best(means, half, 1)
