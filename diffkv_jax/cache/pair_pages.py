"""Pages that merged layers need: nothing depends on the text (MiniCache; docs/design.md 11)."""

import numpy as np
from jax import Array

from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.spec import CacheSpec


def pages_of_pair(spec: CacheSpec, tokens: Array | np.ndarray) -> Array:
    """Pages that a pair of heads needs for `tokens` (ints) that both have stored."""
    assert spec.pairs is not None
    retained = spec.pairs.retained(tokens)
    return 2 * spec.layout.pages_for(0, retained) + spec.layout.pages_for(
        spec.layout.tiers - 1, tokens - retained
    )


def pages_needed(spec: CacheSpec, tier_len: Array, entering: Array) -> Array:
    """Pages beyond the present ones for `entering` int32 [...] tokens, given the lengths `[...,
    tiers]` of pairs' second layers.
    """
    held = tier_len.sum(axis=-1)
    return pages_of_pair(spec, held + entering) - pages_of_pair(spec, held)


def pages_of_pairs(cache: KVCache, entering: Array) -> Array:
    """Pages int32 [R] that all merged layers need for `entering` int32 [R] tokens beyond the
    present ones.
    """
    spec = cache.spec
    second = cache.stored.tier_len[spec.unmerged_layers + 1 :: 2]
    return pages_needed(spec, second, entering[:, None]).sum(axis=(0, 2))
