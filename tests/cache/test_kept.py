"""`kept_positions` against the tokens that are read back one by one."""

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import prompt, tiny_model

SHORT = {"window": 8, "flush": 4}
POLICIES = {
    "two tiers": dkv.diffkv(1.5, 0.5, **SHORT),
    "one tier": dkv.tova(0.3, **SHORT),
    "layers in pairs": dkv.minicache(inner="K4V4", **SHORT),
    "nothing stored": dkv.CompressionPolicy.none(),
}


@pytest.mark.daily(3)
@pytest.mark.parametrize("name", POLICIES)
def test_every_head_of_every_layer(name: str):
    model, params = tiny_model(q_heads=4, kv_heads=2, layers=4)
    prompts = [prompt(50, 1), prompt(33, 2)]
    cache = dkv.generate(model, params, prompts, policy=POLICIES[name], max_new_tokens=7).cache
    kept, counts = dkv.kept_positions(cache), set()
    for layer, request, head in np.ndindex(4, 2, 2):
        found = kept[layer][request][head]
        assert found.tolist() == sorted(held_tokens(cache, layer, request, head))
        counts.add(len(found))
    dropped = name in ("two tiers", "one tier")
    assert (min(counts) < 39) == dropped and max(counts) <= 56


def test_of_no_cache():
    with pytest.raises(TypeError, match="cache=None must be a KVCache"):
        dkv.kept_positions(None)
