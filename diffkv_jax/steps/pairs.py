"""What leaves the windows of two merged layers is stored for both at once (MiniCache,
arXiv:2405.14366; docs/design.md 11).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.cache.cache import CacheSpec, KVCache
from diffkv_jax.cache.layer import stored_layer, take_layer, with_stored
from diffkv_jax.pallas_kernels.apply_event import Tokens, append_tokens
from diffkv_jax.pallas_kernels.codecs import angle
from diffkv_jax.policy.keep import lowest


def pages_of_pair(spec: CacheSpec, tokens: Array | np.ndarray) -> Array:
    """Pages that a pair of heads needs for `tokens` (ints) that both have stored."""
    assert spec.merge is not None
    retained = spec.merge.retained(tokens)
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
    return pages_needed(spec, cache.tier_len[spec.unmerged_layers + 1 :: 2], entering[:, None]).sum(
        axis=(0, 2)
    )


def merge_pair(
    cache: KVCache, layer: Array, first: Tokens, second: Tokens, leaving: Array
) -> KVCache:
    """Store the tokens `leaving` (bool [B, n]) of the pair whose second layer is `layer`; the
    caller has made sure of the pages.

    `first`, `second` are the tokens `[B, n, ...]` of the two layers. The most different ones go to
    the exact tier of each; of the others the second layer keeps in its last tier what serves both.
    """
    layout = cache.spec.layout
    retained = _most_different(
        cache.spec, take_layer(cache.tier_len, layer), first, second, leaving
    )
    for one, tokens in ((layer - 1, first), (layer, second)):
        cache = with_stored(
            cache, one, append_tokens(stored_layer(cache, one), layout, 0, tokens, retained)
        )
    both = second._replace(
        k=jnp.concatenate([first.k, second.k], axis=-1),
        v=jnp.concatenate([first.v, second.v], axis=-1),
    )
    return with_stored(
        cache,
        layer,
        append_tokens(
            stored_layer(cache, layer), layout, layout.tiers - 1, both, leaving & ~retained
        ),
    )


def _most_different(
    spec: CacheSpec, tier_len: Array, first: Tokens, second: Tokens, leaving: Array
) -> Array:
    """Which of the tokens `leaving` stay unmerged, bool [B, n]: as many as bring a head's share to
    what is retained of all.

    Those with the largest sum of the angles between both layers' keys and between their values; of
    equals the earlier.
    """
    assert spec.merge is not None
    after = spec.merge.retained(tier_len.sum(axis=-1) + leaving.sum(axis=-1))
    k, v = (
        angle(jnp.swapaxes(x, 1, 2), jnp.swapaxes(y, 1, 2))[:, 0]
        for x, y in zip(first[:2], second[:2], strict=True)
    )
    return leaving & lowest(jnp.where(leaving, -k - v, jnp.inf), after - tier_len[:, 0])
