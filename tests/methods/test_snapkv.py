"""SnapKV: eviction beside a codec."""

import numpy as np
from tiny_llama import LAYERS, LENGTH, PROMPT, models

import diffkv_jax as dkv
from diffkv_jax.testing.readback import held_tokens


def test_evicting_changes_nothing_of_the_tokens_that_stay():
    """Separable codecs: a kept token's four-bit K and V are those of the cache that keeps
    everything.
    """
    _, model, params = models(2)
    everything, some = (
        dkv.generate(
            model, params, PROMPT[None], policy=dkv.snapkv(keep, tiers=("K4V4",)), max_new_tokens=1
        ).cache
        for keep in (1.0, 0.4)
    )
    for layer in range(LAYERS):
        whole, part = held_tokens(everything, layer, 0, 1), held_tokens(some, layer, 0, 1)
        assert len(whole) == LENGTH and len(part) == 120
        for at, (tier, k, v, _) in part.items():
            assert tier == whole[at][0]
            np.testing.assert_array_equal(k, whole[at][1])
            np.testing.assert_array_equal(v, whole[at][2])
