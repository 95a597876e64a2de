"""Caches of one layer, made on the device and full of random bits, in the shapes of a real model:
what the timings run on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.pallas_kernels.codecs import Full, KVFormat
from diffkv_jax.pallas_kernels.decode_attention import Heads
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages

COMPRESSED, PLAIN = ("K8V4", "K4V2"), ("full",)


@dataclass(frozen=True)
class Setting:
    """What the sections run with: the kernels under test and the attention geometry of a model.

    Attributes:
        slots, recent: size of a head's recent window, and how many of its slots are live.
        cold_bytes: the layers that a timing loop goes round hold at least this much, more than a
            card's cache.
        most_layers: and there are at most so many of them.
    """

    kernels: Kernels
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    dtype: str = "bfloat16"
    slots: int = 96
    recent: int = 80
    cold_bytes: int = 256 << 20
    most_layers: int = 8
    tiny: bool = False

    def pairs(self) -> dict[str, Kernels]:
        """The kernels under test and the plain XLA implementation."""
        return {self.kernels.implementation: self.kernels, "xla": XLA}

    def layout(self, tiers: Sequence[str], max_len: int) -> PageLayout:
        """Pages of these tiers; they score when there are two."""
        formats = tuple(KVFormat.parse(name, self.dtype) for name in tiers)
        return PageLayout.solve(
            formats,
            self.head_dim,
            tokens=self.kernels.tokens_per_block,
            max_len=max_len,
            scored=len(tiers) == 2,
        )

    def layers(self, layer_bytes: int) -> int:
        """How many layers a timing loop goes round."""
        return max(1, min(self.most_layers, -(-self.cold_bytes // layer_bytes)))

    def queries(self, *shape: int, seed: int = 0) -> Array:
        """Normal draws `[*shape, head_dim]` in the model's dtype."""
        return jax.random.normal(jax.random.key(seed), (*shape, self.head_dim)).astype(self.dtype)


def hashed(shape: Sequence[int], seed: int | Array) -> Array:
    """Random-looking uint32 of any shape, cheap and without temporary arrays under jit."""
    bits = jnp.full(shape, jnp.asarray(seed, jnp.uint32) + 1, jnp.uint32)
    for axis in range(len(shape)):
        bits = (bits ^ lax.broadcasted_iota(jnp.uint32, shape, axis)) * np.uint32(0x9E3779B1)
        bits = (bits ^ (bits >> 15)) * np.uint32(0x85EBCA77)
    return bits ^ (bits >> 13)


def uniform(shape: Sequence[int], seed: int | Array) -> Array:
    """float32 in [0, 1) from `hashed`."""
    return (hashed(shape, seed) >> 8).astype(jnp.float32) * 2.0**-24


@partial(jax.jit, static_argnames=("layout", "num_pages", "max_len", "seed"))
def random_pages(layout: PageLayout, num_pages: int, max_len: int, seed: int = 0) -> Pages:
    """A pool of random codes, small positive scales and zero points, and significance in [0, 1);
    exact tiers hold +-[0.5, 2).
    """
    shapes = jax.eval_shape(lambda: Pages.zeros(layout, num_pages))
    payload = (hashed(shapes.payload.shape, seed) >> 24).astype(jnp.uint8)
    if isinstance(layout.formats[0].key, Full):
        if layout.formats[0].key.dtype != "bfloat16" or layout.tiers != 1:
            raise ValueError("random bits of exact tiers are made for a single bfloat16 tier only")
        # the byte of the exponent
        high = (
            lax.broadcasted_iota(jnp.int32, payload.shape, 1) % (2 * layout.head_dim)
            >= layout.head_dim
        )
        payload = jnp.where(high, (payload & 128) | 0x3F, payload)
    return Pages(
        payload=payload,
        meta=(0.01 + 0.01 * uniform(shapes.meta.shape, seed + 1)).astype(jnp.float16),
        significance=uniform(shapes.significance.shape, seed + 2),
        position=(hashed(shapes.position.shape, seed + 3) % np.uint32(max_len)).astype(
            shapes.position.dtype
        ),
    )


def max_pages(layout: PageLayout, max_len: int) -> int:
    """Width of a page table, as in a cache."""
    return layout.pages_for(0, max_len) + layout.tiers


def page_table(
    layout: PageLayout, lengths: Sequence[int], ids: np.ndarray, max_len: int, none: int
) -> np.ndarray:
    """int32 `[B, max_pages]` of heads that all hold `lengths` tokens in the tiers; `ids [B, pages]`
    are their pages, `none` is no page.
    """
    width = max_pages(layout, max_len)
    table = np.full((len(ids), width), none, np.int32)
    high = layout.pages_for(0, lengths[0])
    table[:, :high] = ids[:, :high]
    if layout.tiers == 2:
        low = layout.pages_for(1, lengths[1])
        table[:, width - low :] = ids[:, high : high + low]
    return table


def pages_of(layout: PageLayout, lengths: Sequence[int]) -> int:
    """Pages of one head that holds `lengths` tokens."""
    return sum(layout.pages_for(tier, n) for tier, n in enumerate(lengths))


def layer_tables(
    layout: PageLayout,
    lengths: Sequence[int],
    heads: int,
    layers: int,
    num_pages: int,
    max_len: int,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Page tables of `layers` layers, each `[heads, max_pages]`, with pages in random order, and
    the ids of the free pages.
    """
    need = pages_of(layout, lengths)
    order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    owned = order[: layers * heads * need].reshape(layers, heads, need)
    return [page_table(layout, lengths, ids, max_len, num_pages) for ids in owned], order[
        layers * heads * need :
    ]


def layer_heads(
    setting: Setting, layout: PageLayout, tables: Sequence[np.ndarray], lengths: Sequence[int]
) -> list[Heads]:
    """`Heads` of each layer; the recent windows are shared arrays `[layers, B, slots,
    head_dim]`.
    """
    heads = len(tables[0])
    windows = [setting.queries(len(tables), heads, setting.slots, seed=seed) for seed in (1, 2)]
    tier_len = jnp.tile(jnp.asarray(lengths, jnp.int32), (heads, 1))
    recent_len = jnp.full(heads, setting.recent, jnp.int32)
    return [
        Heads(jnp.asarray(table), tier_len, windows[0], windows[1], recent_len, jnp.int32(layer))
        for layer, table in enumerate(tables)
    ]


def attended_bytes(setting: Setting, layout: PageLayout, lengths: Sequence[int], heads: int) -> int:
    """Bytes that decode attention of one layer must move: payload, metadata, significance both
    ways, the live recent slots.
    """
    stored = sum(
        n * (fmt.token_bytes(layout.head_dim) + 8 * layout.scored)
        for n, fmt in zip(lengths, layout.formats, strict=True)
    )
    return heads * (
        stored + 2 * setting.recent * setting.head_dim * jnp.dtype(setting.dtype).itemsize
    )
