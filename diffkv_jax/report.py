"""`memory_report`: what a cache holds and takes, counted from its arrays."""

from dataclasses import dataclass

import humanize
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from diffkv_jax.budget import tree_bytes
from diffkv_jax.cache import KVCache


@dataclass(frozen=True)
class MemoryReport:
    """Bytes and tokens of a cache. L paged layers, R requests, K KV heads; all arrays are NumPy.

    Attributes:
        tier_names: names of the stored tiers.
        tokens: int [L, R, K, tiers + 1], live tokens per stored tier and, last, in the recent window.
        dropped: int [L, R, K], tokens seen and no longer held.
        pages: int [L, R, K, tiers], pages in use.
        logical: bytes of the live tokens alone.
        allocated: whole pages in use, page tables, recent windows, sliding-window rings and counters.
        pool: everything that was reserved, free pages included.
        bf16: bytes of the same tokens in a plain bfloat16 cache without padding.
        layer_allocated: int [L], the allocated bytes of each paged layer.
    """

    tier_names: tuple[str, ...]
    tokens: np.ndarray
    dropped: np.ndarray
    pages: np.ndarray
    logical: int
    allocated: int
    pool: int
    bf16: int
    layer_allocated: np.ndarray

    @property
    def kept_fraction(self) -> np.ndarray:
        """Share of the seen tokens in each stored tier and, last, in the recent window: float [tiers + 1]."""
        seen = self.tokens.sum() + self.dropped.sum()
        return self.tokens.sum(axis=(0, 1, 2)) / max(seen, 1)

    def __str__(self) -> str:
        table = Table("", "bytes", "of bf16", "tokens held", title="KV cache memory")
        for name, amount in (("logical", self.logical), ("allocated", self.allocated), ("pool", self.pool), ("bf16", self.bf16)):
            table.add_row(name, humanize.naturalsize(amount, binary=True), f"{amount / max(self.bf16, 1):.1%}", "")
        for name, share in zip((*self.tier_names, "recent"), self.kept_fraction, strict=True):
            table.add_row(f"tier {name}", "", "", f"{share:.1%}")
        table.add_row("dropped", "", "", f"{1 - self.kept_fraction.sum():.1%}" if self.bf16 else "")
        console = Console(width=80)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


def memory_report(cache: KVCache) -> MemoryReport:
    """Count the bytes of a cache from its arrays (reads the small ones to the host)."""
    spec = cache.spec
    layout, attention = spec.layout, spec.attention
    tier_len, seq_len, recent_len = (np.asarray(x) for x in jax.device_get((cache.tier_len, cache.seq_len, cache.recent_len)))
    recent = np.broadcast_to(recent_len[:, None], tier_len.shape[:3])[..., None]
    tokens = np.concatenate([tier_len, recent], axis=-1)
    pages = np.stack([layout.pages_for(t, tier_len[..., t]) for t in range(layout.tiers)], axis=-1)
    table_bytes = tree_bytes((cache.page_table, cache.tier_len, cache.alpha))
    window_bytes = tree_bytes((cache.recent_k, cache.recent_v, cache.recent_significance))
    pool = tree_bytes(cache)
    page_bytes = layout.page_bytes + cache.ring.ids.dtype.itemsize
    item = np.dtype(cache.recent_k.dtype).itemsize
    recent_token = 2 * attention.head_dim * item + (4 if layout.scored else 0)
    ring_tokens = int(np.minimum(seq_len, spec.ring_len).sum()) * len(spec.window_layers) * attention.num_kv_heads
    logical = sum(int(tier_len[..., t].sum()) * layout.token_bytes(t) for t in range(layout.tiers))
    logical += int(recent.sum()) * recent_token + ring_tokens * 2 * attention.head_dim * item
    plain_tokens = int(seq_len.sum()) * len(spec.paged_layers) * attention.num_kv_heads + ring_tokens
    layers = max(len(spec.paged_layers), 1)
    return MemoryReport(
        tier_names=tuple(f"{i} {_name(f)}" for i, f in enumerate(layout.formats)),
        tokens=tokens,
        dropped=seq_len[:, None] - tokens.sum(axis=-1),
        pages=pages,
        logical=logical,
        allocated=pool - (spec.num_pages - int(pages.sum())) * page_bytes,
        pool=pool,
        bf16=plain_tokens * attention.head_dim * 4,
        layer_allocated=pages.sum(axis=(1, 2, 3)) * page_bytes + (table_bytes + window_bytes) // layers,
    )


def _name(fmt) -> str:
    return "full" if not hasattr(fmt.key, "bits") else f"K{fmt.key.bits}V{fmt.value.bits}"
