"""One layer of a `KVCache` with requests and heads flattened to B = R x K, or all layers to B = L x
R x K, and back.
"""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache, Table
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.pallas_kernels.apply_event import Stored
from diffkv_jax.pallas_kernels.codecs import read_by
from diffkv_jax.pallas_kernels.decode_attention import Heads
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.policy.keep import Keep


class Clock(NamedTuple):
    """Where each head stands. `B` = requests x KV heads."""

    seq_len: Array  # int32 [B] tokens seen
    query_spans: Array  # int32 [B, spans, 2] queries that a score is divided by, as in `KVCache`
    keep: Keep  # which tokens stay, its leaves [B]
    exact: Array  # int32 [B] tokens that stay in the recent window
    # bool []; without, every token enters the high tier and none leaves it
    decides: Array


_LAYERED = ("page_table", "tier_len")


def take_layer(array: Array, layer: Array | None) -> Array:
    """`array[layer]` of `[L, R, K, ...]`, flattened to `[B, ...]`; all layers when None."""
    if layer is None:
        return array.reshape(math.prod(array.shape[:3]), *array.shape[3:])
    one = lax.dynamic_index_in_dim(array, layer, keepdims=False)
    return one.reshape(math.prod(one.shape[:2]), *one.shape[2:])


def put_layer(array: Array, layer: Array | None, value: Array) -> Array:
    """`array` with `array[layer]` replaced by `value [B, ...]`; all layers when None."""
    if layer is None:
        return value.reshape(array.shape).astype(array.dtype)
    return lax.dynamic_update_index_in_dim(
        array, value.reshape(array.shape[1:]).astype(array.dtype), layer, 0
    )


def per_head(cache: KVCache, per_request: Array, layers: int = 1) -> Array:
    """`[R, ...]` repeated over the KV heads, `[B, ...]`, and over `layers`, `[layers x B, ...]`."""
    heads = jnp.repeat(
        per_request,
        cache.spec.attention.num_kv_heads,
        axis=0,
        total_repeat_length=cache.spec.num_heads,
    )
    return heads if layers == 1 else jnp.tile(heads, (layers, *(1,) * (heads.ndim - 1)))


def head_numbers(cache: KVCache, layer: Array | None) -> Array:
    """int32 [B] of a layer ([layers x B] when None): a number for each layer and KV head, the same
    for all requests.
    """
    spec = cache.spec
    row = jnp.arange(spec.num_heads * (len(spec.paged_layers) if layer is None else 1))
    at = row // spec.num_heads if layer is None else layer
    return at * spec.attention.num_kv_heads + row % spec.attention.num_kv_heads


def all_heads(array: Array) -> Array:
    """`[L, R, K, ...]` as `[L, B, ...]`, B = R x K."""
    layers, requests, heads = array.shape[:3]
    return array.reshape(layers, requests * heads, *array.shape[3:])


def stored_layer(cache: KVCache, layer: Array | None) -> Stored:
    """The stored tokens of a paged layer; of all when None."""
    return Stored(
        cache.pages, cache.ring, *(take_layer(getattr(cache, name), layer) for name in _LAYERED)
    )


def with_stored(cache: KVCache, layer: Array | None, stored: Stored) -> KVCache:
    """The cache with a layer's stored tokens replaced; with those of all layers when None."""
    put = partial(put_layer, layer=layer)
    return dataclasses.replace(
        cache,
        pages=stored.pages,
        ring=stored.ring,
        page_table=put(cache.page_table, value=stored.page_table),
        tier_len=put(cache.tier_len, value=stored.tier_len),
    )


def layer_heads(cache: KVCache, layer: Array, recent_len: Array) -> Heads:
    """What attention reads of a paged layer; `recent_len` int32 [R]."""
    return Heads(
        *_tables(cache, layer),
        all_heads(cache.recent_k),
        all_heads(cache.recent_v),
        per_head(cache, recent_len),
        layer,
        jax.tree.map(jnp.asarray, cache.tables),
    )


def _tables(cache: KVCache, layer: Array) -> tuple[Array, Array]:
    """Page table and lengths that a paged layer reads by: the first of a pair finds the shared tier
    where the second keeps it.
    """
    spec = cache.spec
    page_table, tier_len = take_layer(cache.page_table, layer), take_layer(cache.tier_len, layer)
    if spec.pairs is None:
        return page_table, tier_len
    owner = jnp.where(layer < spec.unmerged_layers, layer, layer + 1 - place_in_pair(spec, layer))
    theirs, shared = take_layer(cache.page_table, owner), take_layer(cache.tier_len, owner)[:, -1]
    on_the_right = (
        jnp.arange(spec.max_pages)
        >= spec.max_pages - spec.layout.pages_for(spec.layout.tiers - 1, shared)[:, None]
    )
    return jnp.where(on_the_right, theirs, page_table), tier_len.at[:, -1].set(shared)


def place_in_pair(spec: CacheSpec, layer: Array) -> Array:
    """0 or 1, int32 []: whether a merged paged layer is the first or the second of its pair."""
    return (layer - spec.unmerged_layers) % 2


def layer_layout(cache: KVCache, layer: Array | None, *, learned: bool = True) -> PageLayout:
    """The layout of the pages, its learned codecs holding the arrays of a paged layer's heads `[B,
    ...]`; what two layers share is read as this one's.

    Without `learned` the codecs hold nothing: decode attention on kernels reads what all layers
    have learned from `Heads.tables`. Events on kernels, which know no such codecs, have `layer`
    None.
    """
    layout = cache.spec.layout
    if layer is not None and cache.spec.pairs is not None:  # with nothing learned
        place = place_in_pair(cache.spec, layer)
        return dataclasses.replace(
            layout, formats=tuple(read_by(fmt, place) for fmt in layout.formats)
        )
    if layer is None or not learned or not jax.tree.leaves(cache.tables):
        return layout

    def of_heads(table: Table) -> Array | None:
        if table is None:
            return None
        one = lax.dynamic_index_in_dim(table, layer, keepdims=False)  # [K, ...]
        return jnp.tile(one, (cache.spec.num_requests, *(1,) * (one.ndim - 1)))

    formats = (
        dataclasses.replace(
            fmt,
            key=fmt.key.with_table(of_heads(key)),
            value=fmt.value.with_table(of_heads(value)),
        )
        for fmt, (key, value) in zip(layout.formats, cache.tables, strict=True)
    )
    return dataclasses.replace(layout, formats=tuple(formats))


def unmerged_layout(cache: KVCache, layer: Array | None) -> PageLayout:
    """The layout by which a paged layer that is not merged stores its tokens
    (`CacheSpec.unmerged`).
    """
    # with nothing learned
    return layer_layout(cache, layer) if cache.spec.pairs is None else cache.spec.unmerged.layout


def layer_clock(
    cache: KVCache,
    layer: Array | None,
    seq_len: Array,
    query_spans: Array,
    exact: Array,
    decides: Array,
) -> Clock:
    """Where the heads of a paged layer (all when None) stand.

    The arguments are those of `Clock`, by request: int32 [R], `query_spans` int32 [R, spans, 2],
    `decides` bool [].
    """
    keep = jax.tree.map(lambda leaf: take_layer(leaf, layer), cache.policy.keep)
    layers = 1 if layer is not None else len(cache.spec.paged_layers)
    divides = cache.policy.score is not None and cache.policy.score.per_query
    divided_by = query_spans if divides else jnp.zeros_like(query_spans)
    counters = (seq_len, divided_by, exact)
    seq_len, divided_by, exact = (per_head(cache, x, layers) for x in counters)
    return Clock(seq_len, divided_by, keep, exact, decides)
