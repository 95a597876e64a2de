"""The pool's pages read by plain NumPy: what tests compare the library's kernels with.

Only the layout's numbers (blocks, lanes, bits, groups) are taken from the library; addresses and
decoding are done here and in the modules beside it.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffkv_jax.cache.cache import complete
from diffkv_jax.pallas_kernels.codecs import Levels, Normal, read_by
from diffkv_jax.testing import stored_numbers as stored
from diffkv_jax.testing.blocks import outliers, read_block, stored_rows
from diffkv_jax.testing.normal_levels import dequantise_normal
from diffkv_jax.testing.quantiser import dequantise, unpack

TIERS = ("high", "low", "shared")


def widths(layout, tier: int) -> tuple[int, int]:
    """Channels of the two halves of a block: K and V, or a latent and its rotary part."""
    rank = getattr(layout.formats[tier], "rank", None)
    return (layout.head_dim, layout.head_dim) if rank is None else (rank, layout.head_dim - rank)


def outliers_of_tokens(codec) -> bool:
    """Whether the codec keeps a few values of each token beside another codec, and nothing that
    belongs to a block.
    """
    return getattr(codec, "axis", None) == "token"


def payload_rows(codec, head_dim: int) -> int:
    """Bytes that a token's K or V takes."""
    codec = getattr(codec, "inner", codec)
    if outliers_of_tokens(codec):
        return payload_rows(codec.codec, head_dim) + codec.count
    if hasattr(codec, "tokens"):
        return stored_rows(codec, head_dim)[0]
    if hasattr(codec, "dtype"):
        return head_dim * jnp.dtype(codec.dtype).itemsize
    return head_dim // getattr(codec, "channels", 1) * codec.bits // 8


def meta_rows(codec) -> int:
    """float16 rows of a token's K or V: a scale and a zero point a group, one scale, half and
    middle of its range, or those of all channels over the lanes of a block; and the norms of two
    layers that share it.
    """
    if hasattr(codec, "inner"):
        return meta_rows(codec.inner) + 2
    if outliers_of_tokens(codec):
        return meta_rows(codec.codec) + codec.count
    if hasattr(codec, "tokens"):
        return stored_rows(codec, codec.head_dim)[1]
    if isinstance(codec, Levels):
        return 2
    return 2 * codec.groups if hasattr(codec, "groups") else int(isinstance(codec, Normal))


def decode_tensor(
    codec, payload: np.ndarray, meta: np.ndarray, table: np.ndarray | None = None
) -> np.ndarray:
    """Payload uint8 `[rows, T]` and metadata float16 `[meta_rows, T]` as float32 `[T, head_dim]`;
    `table` is a head's learned array.
    """
    meta = meta.view(np.float16)  # TPU caches keep the bits as int16
    if hasattr(codec, "inner"):  # a direction, and the norms of the two layers that share it
        return (
            decode_tensor(codec.inner, payload, meta[:-2])
            * stored.read_scale(meta[-2 + codec.reads])[:, None]
        )
    # of another codec's numbers, the values of the channels that the last rows name
    if outliers_of_tokens(codec):
        n = codec.count
        x = decode_tensor(codec.codec, payload[:-n], meta[:-n], table)
        x[np.arange(len(x)), payload[-n:]] = outliers(meta[-n:])
        return x
    if hasattr(codec, "tokens"):
        blocks = range(0, payload.shape[1], codec.tokens)
        parts = [
            read_block(codec, payload[:, at : at + codec.tokens], meta[:, at : at + codec.tokens])
            for at in blocks
        ]
        return np.concatenate([np.zeros((0, codec.head_dim), np.float32), *parts])
    if table is not None and table.ndim == 1:  # levels of the token's range
        half, middle = stored.read_scale(meta[0])[:, None], stored.read_zero(*meta)[:, None]
        return table.astype(np.float32)[unpack_codes(payload, codec.bits).T] * half + middle
    if table is not None:  # one codebook a group of channels
        codes = unpack_codes(payload, codec.bits)
        return np.concatenate(
            [book[code].astype(np.float32) for book, code in zip(table, codes, strict=True)], axis=1
        )
    if isinstance(codec, Normal):
        return dequantise_normal(unpack(payload, codec.bits).T, meta.T, codec.bits)
    if hasattr(codec, "bits"):
        return dequantise(
            unpack(payload, codec.bits).T, meta[: codec.groups].T, meta[codec.groups :].T
        )
    dtype = np.dtype(jnp.dtype(codec.dtype))
    planes = payload.reshape(
        dtype.itemsize, len(payload) // dtype.itemsize, -1 if payload.size else 0
    )  # byte i of every channel is plane i
    return np.ascontiguousarray(planes.transpose(2, 1, 0)).view(dtype)[..., 0].astype(np.float32)


def unpack_codes(payload: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[n, T]` of bytes `[rows, T]`; three bits are the rows of the lower two, then those of
    the upper one.
    """
    if bits != 3:
        return unpack(payload, bits)
    two = len(payload) * 2 // 3
    return unpack(payload[:two], 2) | unpack(payload[two:], 1) << 2


class TierTokens(NamedTuple):
    """The tokens of one tier of one head, in slot order."""

    position: np.ndarray  # int [n]
    significance: np.ndarray  # float32 [n]; zeros when the policy does not score
    k: np.ndarray  # float32 [n, head_dim]
    v: np.ndarray  # float32 [n, head_dim]


def slot_addresses(
    layout, table_row: np.ndarray, tier: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(page id, block, lane) of slots 0 to `length` of a tier: tier 0 from the left end of the
    table, tier 1 from the right.
    """
    slot = np.arange(length)
    page, within = np.divmod(slot, layout.blocks[tier] * layout.tokens)
    column = page if tier == 0 else len(table_row) - 1 - page
    return table_row[column], within // layout.tokens, within % layout.tokens


def tensor_rows(layout, tier: int) -> list[tuple[str, int, int]]:
    """(array, first row of block 0, rows of one block) of K payload, V payload, K metadata and V
    metadata.
    """
    fmt, blocks = layout.formats[tier], layout.blocks[tier]
    k_rows, v_rows = (
        payload_rows(codec, width)
        for codec, width in zip((fmt.key, fmt.value), widths(layout, tier), strict=True)
    )
    k_meta, v_meta = meta_rows(fmt.key), meta_rows(fmt.value)
    return [
        ("payload", 0, k_rows),
        ("payload", blocks * k_rows, v_rows),
        ("meta", 0, k_meta),
        ("meta", blocks * k_meta, v_meta),
    ]


def read_tier(pages, layout, table_row, tier: int, length: int, tables=(None, None)) -> TierTokens:
    """Decode the first `length` slots of a tier; `table_row` int [max_pages], `pages` with arrays
    that NumPy can read.

    `tables` are the head's learned arrays of K and V.
    """
    page, block, lane = slot_addresses(layout, np.asarray(table_row), tier, int(length))
    columns = []
    for name, first, rows in tensor_rows(layout, tier):
        row = first + block[:, None] * rows + np.arange(rows)
        columns.append(np.asarray(getattr(pages, name))[page[:, None], row, lane[:, None]].T)
    k_payload, v_payload, k_meta, v_meta = columns
    fmt = layout.formats[tier]
    significance = np.asarray(pages.significance)
    scores = (
        significance[page, block, lane]
        if significance.shape[1]
        else np.zeros(len(page), np.float32)
    )
    position = np.asarray(pages.position)[page, block, lane].astype(int)
    decoded = (
        decode_tensor(fmt.key, k_payload, k_meta, tables[0]),
        decode_tensor(fmt.value, v_payload, v_meta, tables[1]),
    )
    return TierTokens(position, scores, *decoded)


def held_tokens(
    cache, layer: int, request: int, head: int
) -> dict[int, tuple[str, np.ndarray, np.ndarray, float]]:
    """Every token that a head of a paged layer holds: position to (tier, K float32, V float32,
    significance).

    Of a model with a latent K is the latent and V the rotary part; in the recent window K is the
    two together and V has no channels.
    """
    cache, spec, held = complete(cache), cache.spec, {}
    at = (layer, request, head)
    for tier, name in zip(range(spec.layout.tiers), TIERS, strict=False):
        layout, owner = spec.layout, at
        # the second of a pair has it
        if spec.pairs is not None and tier == layout.tiers - 1 and layer >= spec.unmerged_layers:
            place = (layer - len(cache.stored.tier_len)) % 2
            owner = (layer + 1 - place, request, head)
            layout = dataclasses.replace(
                layout, formats=tuple(read_by(fmt, place) for fmt in layout.formats)
            )
        length = int(np.asarray(cache.stored.tier_len)[owner][tier])
        tables = [
            table if table is None else np.asarray(table)[layer, head]
            for table in cache.tables[tier]
        ]
        tokens = read_tier(
            cache.stored.pages,
            layout,
            np.asarray(cache.stored.page_table)[owner],
            tier,
            length,
            tables,
        )
        for position, score, k, v in zip(
            tokens.position, tokens.significance, tokens.k, tokens.v, strict=True
        ):
            assert int(position) not in held, f"position {position} is held twice"
            held[int(position)] = (name, k, v, float(score))
    recent = int(np.asarray(cache.counters.recent_len)[request])
    first = int(np.asarray(cache.counters.seq_len)[request]) - recent
    keys, values, scores = (
        np.asarray(x)[at].astype(np.float32)
        for x in (cache.recent.k, cache.recent.v, cache.recent.significance)
    )
    for slot in range(recent):
        assert first + slot not in held, f"position {first + slot} is held twice"
        held[first + slot] = (
            "recent",
            keys[slot],
            values[slot],
            float(scores[slot]) if len(scores) else 0.0,
        )
    return held


def page_ids_in_use(
    layout, page_table: np.ndarray, tier_len: np.ndarray, num_pages: int
) -> list[int]:
    """All page ids in tables `[..., max_pages]`; asserts that columns that no tier uses hold
    `num_pages` (none).
    """
    page_table, tier_len = np.asarray(page_table), np.asarray(tier_len)
    rows = page_table.reshape(-1, page_table.shape[-1])
    used = []
    for row, lengths in zip(rows, tier_len.reshape(len(rows), -1), strict=True):
        pages = [
            -(-int(n) // (layout.blocks[tier] * layout.tokens)) for tier, n in enumerate(lengths)
        ]
        right = sum(pages[1:])
        assert right == max(pages[1:], default=0), f"{pages}: one tier at the right end"
        assert pages[0] + right <= len(row)
        mine = [*row[: pages[0]], *row[len(row) - right :]]
        assert all(0 <= page < num_pages for page in mine), f"{row} must hold pages {pages}"
        unused = row[pages[0] : len(row) - right]
        assert (unused == num_pages).all(), f"{row} holds ids beyond its pages {pages}"
        used += [int(page) for page in mine]
    return used


def check_pool(layout, page_table, tier_len, ring) -> None:
    """Every page is either free or owned by one head, and no id appears twice."""
    ids, start, count = np.asarray(ring.ids), int(ring.start), int(ring.count)
    used = page_ids_in_use(layout, page_table, tier_len, len(ids))
    free = [int(ids[(start + i) % len(ids)]) for i in range(count)]
    assert len(used) + len(free) == len(ids)
    assert sorted(used + free) == list(range(len(ids)))
