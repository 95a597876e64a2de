"""`kept_positions`: which tokens each head holds."""

import jax
import numpy as np

from diffkv_jax.arguments import instance
from diffkv_jax.cache.cache import KVCache, complete
from diffkv_jax.pallas_kernels.precision import in_32_bits

Positions = list[list[list[np.ndarray]]]


@in_32_bits
def kept_positions(cache: KVCache) -> Positions:
    """Positions of the tokens that each head holds, those in the recent window included: ascending
    int64 arrays `[layer][request][kv_head]`.

    Layers are those without a sliding window, in order. The token that was generated last is in
    none: the model has not seen it (`cache.counters.pending`). Reads the page tables to the host.

    Raises:
        TypeError: it is no cache.
    """
    instance("cache", cache, KVCache, "generate returns one as .cache, make_cache an empty one")
    cache, spec = complete(cache), cache.spec
    arrays = (
        cache.stored.page_table,
        cache.stored.tier_len,
        cache.stored.pages.position,
        cache.counters.seq_len,
        cache.counters.recent_len,
    )
    table, tier_len, position, seq_len, recent_len = jax.device_get(arrays)

    def stored(layer: int, request: int, head: int, tier: int) -> np.ndarray:
        if spec.pairs is not None and tier == spec.layout.tiers - 1:
            if layer < spec.unmerged_layers:
                return np.empty(0, np.int64)
            layer += 1 - (layer - spec.unmerged_layers) % 2  # the second of a pair has it
        length, blocks = tier_len[layer, request, head, tier], spec.layout.blocks[tier]
        pages = -(-length // spec.layout.tokens_per_page(tier))
        row = table[layer, request, head]
        ids = row[:pages] if tier == 0 else row[::-1][:pages]
        return position[ids, :blocks].reshape(-1)[:length].astype(np.int64)

    def kept(layer: int, request: int, head: int) -> np.ndarray:
        tiers = [stored(layer, request, head, tier) for tier in range(spec.layout.tiers)]
        recent = np.arange(seq_len[request] - recent_len[request], seq_len[request])
        return np.sort(np.concatenate([*tiers, recent]))

    layers, requests, heads = tier_len.shape[:3]
    return [
        [[kept(layer, request, head) for head in range(heads)] for request in range(requests)]
        for layer in range(layers)
    ]
