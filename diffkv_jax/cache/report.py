"""`memory_report`: what a cache holds and takes, counted from its arrays."""

from dataclasses import dataclass

import humanize
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from diffkv_jax.arguments import instance
from diffkv_jax.cache.cache import KVCache, complete
from diffkv_jax.cache.pool_size import tree_bytes
from diffkv_jax.pallas_kernels.precision import in_32_bits


@dataclass(frozen=True)
class MemoryReport:
    """Bytes and tokens of a cache: L paged layers, R requests, K KV heads; NumPy int64 arrays.

    Attributes:
        tier_names: names of the stored tiers; the last entry of a tier axis below is the recent
            window.
        tokens: [L, R, K, tiers + 1], tokens held; those that two layers share are held by both.
        dropped: [L, R, K], tokens seen and no longer held.
        pages: [L, R, K, tiers], pages in use; those that two layers share count for the second, as
            do their bytes.
        logical_bytes: [L, R, K, tiers + 1], what the held tokens alone need.
        allocated_bytes: [L, R, K, tiers + 1], whole pages in use; with the recent window its whole
            buffer and the head's tables.
        bf16_bytes: [R], a plain bfloat16 cache of the same tokens, without padding.
        logical: all held tokens, sliding-window rings included.
        allocated: all of `allocated_bytes`, sliding-window rings and counters.
        pool: everything that was reserved, free pages included.
    """

    tier_names: tuple[str, ...]
    tokens: np.ndarray
    dropped: np.ndarray
    pages: np.ndarray
    logical_bytes: np.ndarray
    allocated_bytes: np.ndarray
    bf16_bytes: np.ndarray
    logical: int
    allocated: int
    pool: int

    @property
    def bf16(self) -> int:
        """Bytes of a plain bfloat16 cache of the same tokens."""
        return int(self.bf16_bytes.sum())

    @property
    def kept_fraction(self) -> np.ndarray:
        """Share of the seen tokens in each tier and, last, the recent window: float [tiers + 1]."""
        seen = self.tokens.sum() + self.dropped.sum()
        return self.tokens.sum(axis=(0, 1, 2)) / max(seen, 1)

    def __str__(self) -> str:
        table = Table("", "bytes", "of bf16", "tokens held", title="KV cache memory")
        for name in ("logical", "allocated", "pool", "bf16"):
            amount = getattr(self, name)
            size = humanize.naturalsize(amount, binary=True)
            table.add_row(name, size, f"{amount / max(self.bf16, 1):.1%}", "")
        names = (*self.tier_names, "recent")
        per_tier = self.allocated_bytes.sum(axis=(0, 1, 2))
        for name, amount, share in zip(names, per_tier, self.kept_fraction, strict=True):
            size = humanize.naturalsize(int(amount), binary=True)
            table.add_row(f"  {name}", size, f"{amount / max(self.bf16, 1):.1%}", f"{share:.1%}")
        dropped = f"{1 - self.kept_fraction.sum():.1%}" if self.tokens.any() else ""
        table.add_row("  dropped", "", "", dropped)
        console = Console(width=80)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


@in_32_bits
def memory_report(cache: KVCache) -> MemoryReport:
    """Count the bytes of a cache from its arrays (reads the small ones to the host).

    Raises:
        TypeError: it is no cache.
    """
    remedy = "generate returns one as .cache, make_cache makes an empty one"
    instance("cache", cache, KVCache, remedy)
    cache, spec = complete(cache), cache.spec
    layout, attention = spec.layout, spec.attention
    counters = jax.device_get(
        (cache.stored.tier_len, cache.counters.seq_len, cache.counters.recent_len)
    )
    tier_len, seq_len, recent_len = (np.asarray(x, np.int64) for x in counters)
    by_head = (*tier_len.shape[:3], 1)
    recent = np.broadcast_to(recent_len[:, None, None], by_head)
    owned = np.concatenate([tier_len, recent], axis=-1)
    tokens = owned.copy()
    if spec.pairs is not None:
        tokens[spec.unmerged_layers :: 2, ..., -2] = owned[spec.unmerged_layers + 1 :: 2, ..., -2]
    pages = np.stack([layout.pages_for(t, tier_len[..., t]) for t in range(layout.tiers)], axis=-1)
    channels = cache.recent.k.shape[-1] + cache.recent.v.shape[-1]  # of K and V of one token
    exact = channels * cache.recent.k.dtype.itemsize  # in the cache dtype
    token_bytes = [layout.token_bytes(t) for t in range(layout.tiers)]
    token_bytes.append(exact + (4 if layout.scored else 0))
    page_bytes = layout.page_bytes + cache.stored.ring.ids.dtype.itemsize
    tables = cache.stored.page_table, cache.stored.tier_len
    fixed = tree_bytes((*tables, cache.policy, cache.recent))
    head_bytes = np.broadcast_to(fixed // max(pages[..., :1].size, 1), by_head)
    kv_heads, in_rings = attention.num_kv_heads, np.minimum(seq_len, spec.ring_len)
    ring_tokens = in_rings * len(spec.window_layers) * kv_heads
    plain_tokens = seq_len * len(spec.paged_layers) * kv_heads + ring_tokens
    logical_bytes, pool = owned * token_bytes, tree_bytes(cache)
    return MemoryReport(
        tier_names=tuple(f.name for f in layout.formats),
        tokens=tokens,
        dropped=seq_len[:, None] - tokens.sum(axis=-1),
        pages=pages,
        logical_bytes=logical_bytes,
        allocated_bytes=np.concatenate([pages * page_bytes, head_bytes], axis=-1),
        bf16_bytes=plain_tokens * channels * 2,
        logical=int(logical_bytes.sum() + ring_tokens.sum() * exact),
        allocated=pool - (spec.num_pages - int(pages.sum())) * page_bytes,
        pool=pool,
    )
