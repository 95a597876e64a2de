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
    length = len(positions)
    wide = (positions % 2 == 1)[:, None]
    page, block, lane = slot_addresses(layout, table_row, tier, length)
    fmt = layout.formats[tier]
    for codec, payload, meta in zip(
        (fmt.key, fmt.value),
        tensor_rows(layout, tier)[:2],
        tensor_rows(layout, tier)[2:],
        strict=True,
    ):
        count = codec.count if outliers_of_tokens(codec) else 0
        codec = codec.codec if count else codec
        if hasattr(codec, "bits"):
            codes = rng.integers(0, 256, (length, payload[2] - count))
            scale = rng.uniform(0.5, 1.0, (length, getattr(codec, "groups", 1)))
            if isinstance(codec, Levels):
                scale = np.concatenate([scale, rng.normal(size=scale.shape)], axis=1)
            if hasattr(codec, "groups"):
                scale *= 4 / (2**codec.bits - 1)
                scale = np.concatenate([scale, rng.normal(size=scale.shape) - 2], axis=1)
            numbers = scale[:, : meta[2] - count]
            own = (
                numbers.shape[1] // 2
                if hasattr(codec, "groups") or isinstance(codec, Levels)
                else numbers.shape[1]
            )
            kept = np.hstack(
                [stored.marked(numbers[:, :own], wide), stored.beside(numbers[:, own:], wide)]
            )
        else:
            exact = rng.normal(size=(length, layout.head_dim)).astype(jnp.dtype(codec.dtype))
            codes = (
                exact.view(np.uint8)
                .reshape(length, layout.head_dim, exact.dtype.itemsize)
                .swapaxes(1, 2)
                .reshape(length, payload[2])
            )
            kept = np.zeros((length, 0), np.float16)
        if count:  # in different channels, and larger than the others
            channels = rng.permuted(np.tile(np.arange(layout.head_dim), (length, 1)), axis=1)[
                :, :count
            ]
            largest_first = -np.sort(-rng.normal(size=(length, count)) * 3, axis=1)
            turned = np.where(
                wide,
                np.hstack([largest_first[:, count // 2 :], largest_first[:, : count // 2]]),
                largest_first,
            )
            codes, kept = (
                np.hstack([codes, channels]),
                np.hstack([kept, stored.beside(turned, wide)]),
            )
        for (name, first, rows), values in ((payload, codes), (meta, kept)):
            row = first + block[:, None] * rows + np.arange(rows)
            pages[name][page[:, None], row, lane[:, None]] = (
                values.view(pages[name].dtype) if name == "meta" else values
            )
    if layout.scored:
        pages["significance"][page, block, lane] = rng.uniform(0, 2, length)
    pages["position"][page, block, lane] = positions


def on_device(pool: Pool, pages_type, heads_type):
    """The pool as the library's `Pages` and `Heads`, the windows those of layer 1 of two; layer 0
    is NaN.
    """
    recent = (np.stack([np.full_like(x, np.nan), x]) for x in (pool.recent_k, pool.recent_v))
    heads = heads_type(pool.page_table, pool.tier_len, *recent, pool.recent_len, np.int32(1))
    pages, heads = jax.tree.map(jnp.asarray, (pool.pages, heads))
    return pages_type(**pages), heads
