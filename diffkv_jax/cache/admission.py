"""Which requests get the pages they need (docs/design.md 4): in decode in order; of prompts that do
not fit the largest is flagged and emptied, so that the others get its pages.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache, with_counters
from diffkv_jax.cache.layer import LayerView
from diffkv_jax.pallas_kernels.apply_event import release_all


def admit(needed: Array, free: Array) -> Array:
    """Which requests get all the pages they need, `needed [R]`, in order while `free []` lasts; one
    that does not fit takes none.
    """

    def take(left, need):
        fits = need <= left
        return left - jnp.where(fits, need, 0), fits

    return lax.scan(take, free, needed)[1]


def make_room(cache: KVCache, needed: Array) -> KVCache:
    """Set `overflow` for requests whose `needed [R]` pages are not free, one at a time, and give
    back all they hold.

    Of those that starve the largest goes first, by the pages it holds and needs: what it leaves may
    be enough for the others.
    """

    def starving(cache: KVCache) -> Array:
        return (
            ~admit(jnp.where(cache.counters.overflow, 0, needed), cache.stored.ring.count)
            & ~cache.counters.overflow
        )

    def give_up(small: KVCache) -> KVCache:
        size = jnp.where(starving(small), held_pages(small) + needed, -1)
        largest = jnp.arange(needed.shape[0]) == jnp.argmax(size)
        small = with_counters(small, overflow=small.counters.overflow | largest)
        return released(small, largest)

    without_pages = cache.stored._replace(pages=None)  # the loop changes ring and tables only
    small = dataclasses.replace(cache, stored=without_pages)
    small = lax.while_loop(lambda small: starving(small).any(), give_up, small)
    return dataclasses.replace(small, stored=small.stored._replace(pages=cache.stored.pages))


def held_pages(cache: KVCache) -> Array:
    """Pages of each request over all layers and heads, int32 [R]."""
    layout = cache.spec.layout
    if cache.stored.tier_len is None:  # no layer has pages
        return jnp.zeros(cache.spec.num_requests, jnp.int32)
    held = jnp.stack(
        [layout.pages_for(tier, cache.stored.tier_len[..., tier]) for tier in range(layout.tiers)]
    )
    return held.sum(axis=(0, 1, 3))


def released(cache: KVCache, gone: Array) -> KVCache:
    """The cache with all pages of the requests `gone` bool [R] free."""
    if not cache.spec.paged_layers:
        return cache

    def release_layer(layer, cache):
        view = LayerView(cache.spec, layer)
        stored = release_all(view.stored(cache), cache.spec.layout, view.per_head(gone))
        return view.with_stored(cache, stored)

    return lax.fori_loop(0, len(cache.spec.paged_layers), release_layer, cache)
