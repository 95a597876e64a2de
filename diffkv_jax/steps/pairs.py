"""What leaves the windows of two merged layers is stored for both at once (MiniCache,
arXiv:2405.14366; docs/design.md 11).
"""

import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import LayerView
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.pallas_kernels.apply_event import Tokens, append_tokens
from diffkv_jax.pallas_kernels.codecs import angle
from diffkv_jax.policy.ranking import lowest


def merge_pair(
    cache: KVCache, view: LayerView, first: Tokens, second: Tokens, leaving: Array
) -> KVCache:
    """Store the tokens `leaving` (bool [B, n]) of the pair whose second layer is viewed; the
    caller has made sure of the pages.

    `first`, `second` are the tokens `[B, n, ...]` of the two layers. The most different ones go to
    the exact tier of each; of the others the second layer keeps in its last tier what serves both.
    """
    layout, spec = cache.spec.layout, cache.spec
    retained = _most_different(spec, view.take(cache.stored.tier_len), first, second, leaving)
    for one, tokens in ((view.before(), first), (view, second)):
        stored = append_tokens(one.stored(cache), layout, 0, tokens, retained)
        cache = one.with_stored(cache, stored)
    both = second._replace(
        k=jnp.concatenate([first.k, second.k], axis=-1),
        v=jnp.concatenate([first.v, second.v], axis=-1),
    )
    shared = layout.tiers - 1
    stored = append_tokens(view.stored(cache), layout, shared, both, leaving & ~retained)
    return view.with_stored(cache, stored)


def _most_different(
    spec: CacheSpec, tier_len: Array, first: Tokens, second: Tokens, leaving: Array
) -> Array:
    """Which of the tokens `leaving` stay unmerged, bool [B, n]: as many as bring a head's share to
    what is retained of all.

    Those with the largest sum of the angles between both layers' keys and between their values; of
    equals the earlier.
    """
    assert spec.pairs is not None
    after = spec.pairs.retained(tier_len.sum(axis=-1) + leaving.sum(axis=-1))
    k, v = (
        angle(jnp.swapaxes(x, 1, 2), jnp.swapaxes(y, 1, 2))[:, 0]
        for x, y in zip(first[:2], second[:2], strict=True)
    )
    return leaving & lowest(jnp.where(leaving, -k - v, jnp.inf), after - tier_len[:, 0])
