"""Pages with random tokens, written by plain NumPy, where everything else is rubbish."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffkv_jax.pallas_kernels.codecs import Levels
from diffkv_jax.testing import stored_numbers as stored
from diffkv_jax.testing.readback import outliers_of_tokens, slot_addresses, tensor_rows


class Pool(NamedTuple):
    """Heads with random tokens in a pool where everything else is rubbish."""

    pages: dict[str, Any]  # payload, meta, significance, position
    page_table: np.ndarray
    tier_len: np.ndarray
    recent_k: np.ndarray
    recent_v: np.ndarray
    recent_len: np.ndarray


def random_pool(layout, lengths, recent_len, *, max_len: int, slots: int, seed: int = 0) -> Pool:
    """A pool for `B` heads with `lengths [B, tiers]` stored and `recent_len [B]` of `slots` recent
    tokens.

    Codes and metadata are drawn, not encoded. Dead pages, lanes and recent slots hold 255 and NaN,
    unused table columns other ids.
    """
    rng = np.random.default_rng(seed)
    lengths, recent_len = np.asarray(lengths, np.int32), np.asarray(recent_len, np.int32)
    per_page = [blocks * layout.tokens for blocks in layout.blocks]
    counts = -(-lengths // per_page)
    num_pages, max_pages = int(counts.sum()) + 3, -(-max_len // per_page[0]) + layout.tiers
    blocks = layout.token_data_rows
    pages = {
        "payload": np.full((num_pages, layout.rows, layout.tokens), 255, np.uint8),
        "meta": np.full((num_pages, layout.meta_rows, layout.tokens), np.nan, np.float16).view(
            layout.meta_dtype
        ),
        "significance": np.full(
            (num_pages, blocks if layout.scored else 0, layout.tokens), np.nan, np.float32
        ),
        "position": np.full((num_pages, blocks, layout.tokens), 65535, layout.position_dtype),
    }
    ids = list(rng.permutation(num_pages))
    table = rng.choice(
        np.array([-7, 0, 1, num_pages - 1, num_pages, 10**6], np.int32), (len(lengths), max_pages)
    )
    for head, tiers in enumerate(lengths):
        positions = rng.permutation(int(tiers.sum()))
        for tier, length in enumerate(tiers):
            for page in range(counts[head, tier]):
                table[head, page if tier == 0 else max_pages - 1 - page] = ids.pop()
            before = int(tiers[:tier].sum())
            _draw_tokens(
                rng, pages, layout, table[head], tier, positions[before : before + int(length)]
            )
    shape = (len(lengths), slots, layout.head_dim)
    dead = (np.arange(slots) >= recent_len[:, None])[..., None]
    recent_k, recent_v = (
        np.where(dead, np.nan, rng.normal(size=shape)).astype(np.float32) for _ in range(2)
    )
    return Pool(pages, table, lengths, recent_k, recent_v, recent_len)


def _draw_tokens(
    rng, pages: dict[str, Any], layout, table_row: np.ndarray, tier: int, positions: np.ndarray
) -> None:
    """Random codes, scales, zero points and significance for the slots of one tier of one head, at
    `positions`.

    The numbers beside the codes of every second token are bfloat16.
    """
    wide = (positions % 2 == 1)[:, None]
    page, block, lane = slot_addresses(layout, table_row, tier, len(positions))
    fmt, places = layout.formats[tier], tensor_rows(layout, tier)
    for codec, payload, meta in zip((fmt.key, fmt.value), places[:2], places[2:], strict=True):
        drawn = _draw_tensor(rng, codec, layout.head_dim, payload[2], meta[2], wide)
        for (name, first, rows), values in zip((payload, meta), drawn, strict=True):
            row = first + block[:, None] * rows + np.arange(rows)
            pages[name][page[:, None], row, lane[:, None]] = (
                values.view(pages[name].dtype) if name == "meta" else values
            )
    if layout.scored:
        pages["significance"][page, block, lane] = rng.uniform(0, 2, len(positions))
    pages["position"][page, block, lane] = positions


def _draw_tensor(
    rng, codec, head_dim: int, rows: int, meta_rows: int, wide: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Payload `[n, rows]` and metadata float16 `[n, meta_rows]` of K or V of n tokens; `wide` bool
    `[n, 1]` are those whose numbers are bfloat16.
    """
    if outliers_of_tokens(codec):
        inner = rows - codec.count, meta_rows - codec.count
        codes, numbers = _draw_tensor(rng, codec.codec, head_dim, *inner, wide)
        channels, values = _draw_outliers(rng, codec.count, head_dim, wide)
        return np.hstack([codes, channels]), np.hstack([numbers, values])
    if hasattr(codec, "bits"):
        codes = rng.integers(0, 256, (len(wide), rows))
        return codes, _draw_numbers(rng, codec, meta_rows, wide)
    exact = rng.normal(size=(len(wide), head_dim)).astype(jnp.dtype(codec.dtype))
    planes = exact.view(np.uint8).reshape(len(wide), head_dim, exact.dtype.itemsize).swapaxes(1, 2)
    return planes.reshape(len(wide), rows), np.zeros((len(wide), 0), np.float16)


def _draw_numbers(rng, codec, meta_rows: int, wide: np.ndarray) -> np.ndarray:
    """Scales, and where the codec has them zero points or middles of the range behind them."""
    groups = getattr(codec, "groups", 0)
    numbers, own = rng.uniform(0.5, 1.0, (len(wide), groups or 1)), meta_rows
    if isinstance(codec, Levels):
        numbers, own = np.hstack([numbers, rng.normal(size=numbers.shape)]), 1
    if groups:
        numbers *= 4 / (2**codec.bits - 1)
        numbers, own = np.hstack([numbers, rng.normal(size=numbers.shape) - 2]), groups
    scales, beside = numbers[:, :own], numbers[:, own:meta_rows]
    return np.hstack([stored.marked(scales, wide), stored.beside(beside, wide)])


def _draw_outliers(
    rng, count: int, head_dim: int, wide: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`count` different channels of each token, and values larger than the others, as stored."""
    every = np.tile(np.arange(head_dim), (len(wide), 1))
    channels = rng.permuted(every, axis=1)[:, :count]
    falling = -np.sort(-rng.normal(size=(len(wide), count)) * 3, axis=1)
    turned = np.hstack([falling[:, count // 2 :], falling[:, : count // 2]])
    return channels, stored.beside(np.where(wide, turned, falling), wide)


def on_device(pool: Pool, pages_type, heads_type):
    """The pool as the library's `Pages` and `Heads`, the windows those of layer 1 of two; layer 0
    is NaN.
    """
    recent = (np.stack([np.full_like(x, np.nan), x]) for x in (pool.recent_k, pool.recent_v))
    heads = heads_type(pool.page_table, pool.tier_len, *recent, pool.recent_len, np.int32(1))
    pages, heads = jax.tree.map(jnp.asarray, (pool.pages, heads))
    return pages_type(**pages), heads
