"""PyramidKV: the tokens of every layer, against kvpress on torch."""

import pytest
from tiny_llama import LENGTH, PROMPT, kept, models

import diffkv_jax as dkv


@pytest.mark.slow
def test_pyramidkv_keeps_what_kvpress_keeps():
    choice = pytest.importorskip("oracles.kvpress_choice")
    theirs, _, _ = models(2)
    press = choice.presses().PyramidKVPress(compression_ratio=0.5, window_size=16, beta=20)
    scores = choice.scores(press, theirs, PROMPT)
    budgets = [press.get_layer_budget(layer.self_attn, LENGTH) for layer in theirs.model.layers]
    found = kept(dkv.pyramidkv(0.5, sinks=0, window=16))
    assert sorted(budgets, reverse=True) == budgets and budgets[0] > budgets[-1] + 50
    for layer, budget in enumerate(budgets):
        # theirs takes the window off the longest layer, ours stops at all tokens
        count = len(found[layer][0])
        assert abs(count - budget) <= 16
        assert found[layer] == choice.kept_by_best(scores, lambda _, count=count: count, 16)[layer]
