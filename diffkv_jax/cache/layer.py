"""A paged layer of a `KVCache` as operations see it: requests and heads flattened to B = R x K, or
all layers at once, B = L x R x K.
"""

import dataclasses
import math
from dataclasses import dataclass
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
from diffkv_jax.policy.transform import Transform


@dataclass(frozen=True, eq=False)
class LayerView:
    """Where a layer, or all of them at once, lies in the arrays of a cache. It is made where a step
    or an event comes to the layer, and handed down; it holds no array of the cache, so that it
    stays true when that changes. No pytree: close over it.
    """

    spec: CacheSpec
    layer: Array | None  # int32 [] among the paged layers; None: all of them

    @property
    def index(self) -> Array:
        """int32 [] of the one layer."""
        assert self.layer is not None
        return self.layer

    def before(self) -> "LayerView":
        """The view of the layer before."""
        return LayerView(self.spec, self.index - 1)

    @property
    def num_layers(self) -> int:
        return len(self.spec.paged_layers) if self.layer is None else 1

    def take(self, array: Array) -> Array:
        """`[L, R, K, ...]` to this layer's `[B, ...]`."""
        if self.layer is None:
            return array.reshape(math.prod(array.shape[:3]), *array.shape[3:])
        one = lax.dynamic_index_in_dim(array, self.index, keepdims=False)
        return one.reshape(math.prod(one.shape[:2]), *one.shape[2:])

    def put(self, array: Array, value: Array) -> Array:
        """`array [L, R, K, ...]` with this layer's part replaced by `value [B, ...]`."""
        if self.layer is None:
            return value.reshape(array.shape).astype(array.dtype)
        value = value.reshape(array.shape[1:]).astype(array.dtype)
        return lax.dynamic_update_index_in_dim(array, value, self.index, 0)

    def per_head(self, per_request: Array) -> Array:
        """`[R, ...]` repeated over the KV heads, and over the layers: `[B, ...]`."""
        kv_heads, total = self.spec.attention.num_kv_heads, self.spec.num_heads
        heads = jnp.repeat(per_request, kv_heads, axis=0, total_repeat_length=total)
        layers = self.num_layers
        return heads if layers == 1 else jnp.tile(heads, (layers, *(1,) * (heads.ndim - 1)))

    def by_request(self, pages: Array) -> Array:
        """`[B]` added up over heads and layers: `[R]`."""
        return pages.reshape(self.num_layers, self.spec.num_requests, -1).sum(axis=(0, 2))

    def head_numbers(self) -> Array:
        """int32 [B]: a number for each layer and KV head, the same for all requests."""
        kv_heads, num_heads = self.spec.attention.num_kv_heads, self.spec.num_heads
        row = jnp.arange(num_heads * self.num_layers)
        layer = row // num_heads if self.layer is None else self.layer
        return layer * kv_heads + row % kv_heads

    def transform(self, cache: KVCache, axes: int) -> Transform:
        """The policy's transform for arrays `[B, ..., head_dim]` with so many axes."""

        def of_heads(x: Array) -> Array:
            by_head = x.reshape(-1, *x.shape[2:])[self.head_numbers()]
            return by_head.reshape(len(by_head), *(1,) * (axes - 2), *x.shape[2:])

        return jax.tree.map(of_heads, cache.policy.transform)

    def untransformed(self, cache: KVCache, k: Array, v: Array) -> tuple[Array, Array]:
        """Keys and values `[B, n, head_dim]` as the model made them, of stored ones."""
        transform = self.transform(cache, k.ndim)
        k = transform.keys(k, self.spec.attention, back=True)
        return k, transform.output(v) if v.shape[-1] else v

    def stored(self, cache: KVCache) -> Stored:
        """The stored tokens, page_table `[B, max_pages]` and tier_len `[B, tiers]`."""
        pages, ring, page_table, tier_len = cache.stored
        return Stored(pages, ring, self.take(page_table), self.take(tier_len))

    def with_stored(self, cache: KVCache, stored: Stored) -> KVCache:
        """The cache with the stored tokens replaced."""
        page_table = self.put(cache.stored.page_table, stored.page_table)
        tier_len = self.put(cache.stored.tier_len, stored.tier_len)
        stored = Stored(stored.pages, stored.ring, page_table, tier_len)
        return dataclasses.replace(cache, stored=stored)


def all_heads(array: Array) -> Array:
    """`[L, R, K, ...]` as `[L, B, ...]`, B = R x K."""
    layers, requests, heads = array.shape[:3]
    return array.reshape(layers, requests * heads, *array.shape[3:])


class Clock(NamedTuple):
    """Where each head of a layer stands when an event comes. `B` = requests x KV heads."""

    seq_len: Array  # int32 [B] tokens seen
    query_spans: Array  # int32 [B, spans, 2] queries that a score is divided by, as in `Counters`
    keep: Keep  # which tokens stay, its leaves [B]
    exact: Array  # int32 [B] tokens that stay in the recent window
    # bool []; without, every token enters the high tier and none leaves it
    decides: Array


def layer_clock(
    cache: KVCache,
    view: LayerView,
    seq_len: Array,
    query_spans: Array,
    exact: Array,
    decides: Array,
) -> Clock:
    """The arguments are those of `Clock`, by request: int32 [R], `query_spans` int32 [R, spans, 2],
    `decides` bool [].
    """
    keep = jax.tree.map(view.take, cache.policy.keep)
    divides = cache.policy.score is not None and cache.policy.score.per_query
    divided_by = query_spans if divides else jnp.zeros_like(query_spans)
    seq_len, divided_by, exact = map(view.per_head, (seq_len, divided_by, exact))
    return Clock(seq_len, divided_by, keep, exact, decides)


def layer_heads(cache: KVCache, view: LayerView, recent_len: Array) -> Heads:
    """What attention reads of a paged layer; `recent_len` int32 [R]."""
    return Heads(
        *_tables(cache, view),
        all_heads(cache.recent.k),
        all_heads(cache.recent.v),
        view.per_head(recent_len),
        view.index,
        jax.tree.map(jnp.asarray, cache.tables),
    )


def _tables(cache: KVCache, view: LayerView) -> tuple[Array, Array]:
    """Page table and lengths that a paged layer reads by: the first of a pair finds the shared tier
    where the second keeps it.
    """
    spec = cache.spec
    _, _, page_table, tier_len = view.stored(cache)
    if spec.pairs is None:
        return page_table, tier_len
    layer = view.index
    owner = jnp.where(layer < spec.unmerged_layers, layer, layer + 1 - place_in_pair(spec, layer))
    _, _, theirs, their_len = LayerView(spec, owner).stored(cache)
    shared = their_len[:, -1]
    on_the_right = (
        jnp.arange(spec.max_pages)
        >= spec.max_pages - spec.layout.pages_for(spec.layout.tiers - 1, shared)[:, None]
    )
    return jnp.where(on_the_right, theirs, page_table), tier_len.at[:, -1].set(shared)


def place_in_pair(spec: CacheSpec, layer: Array) -> Array:
    """0 or 1, int32 []: whether a merged paged layer is the first or the second of its pair."""
    return (layer - spec.unmerged_layers) % 2


def layer_layout(cache: KVCache, view: LayerView, *, learned: bool = True) -> PageLayout:
    """The layout of the pages, its learned codecs holding the arrays of a paged layer's heads `[B,
    ...]`; what two layers share is read as this one's.

    Without `learned` the codecs hold nothing: decode attention on kernels reads what all layers
    have learned from `Heads.tables`. Events on kernels, which know no such codecs, view all layers.
    """
    layout, layer = cache.spec.layout, view.layer
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


def unmerged_layout(cache: KVCache, view: LayerView) -> PageLayout:
    """The layout by which a paged layer that is not merged stores its tokens
    (`CacheSpec.unmerged`).
    """
    # with nothing learned
    return layer_layout(cache, view) if cache.spec.pairs is None else cache.spec.unmerged.layout
