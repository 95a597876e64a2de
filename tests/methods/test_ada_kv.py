"""Ada-KV: the tokens of every head, against kvpress on torch."""

import pytest
from tiny_llama import PROMPT, kept, models

import diffkv_jax as dkv


@pytest.mark.slow
def test_ada_kv_keeps_what_kvpress_keeps():
    choice = pytest.importorskip("oracles.kvpress_choice")
    theirs, _, _ = models(2)
    theirs.set_attn_implementation("sdpa")
    kvpress = choice.presses()
    expected = choice.kept_by_mask(
        kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=0.5), alpha_safeguard=0.5),
        theirs,
        PROMPT,
    )
    found = kept(dkv.ada_kv(dkv.snapkv(0.5, sinks=0), floor=0.5))
    assert found == expected
    assert any(len(layer[0]) != len(layer[1]) for layer in found)  # heads differ
