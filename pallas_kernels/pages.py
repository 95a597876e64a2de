"""The page: a compressed block of tokens of a head, one shape for all tiers (docs/design.md 2)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .codecs.formats import Block, KVFormat, native_formats


def least_waste(sizes: Iterable[int], waste: Callable[[int], Sequence[float]]) -> int:
    """The size whose worst waste over the tiers is least, the smallest of equals; `waste(size)`
    gives a fraction a tier, 1 = no fit.
    """
    return min(sizes, key=lambda size: (round(max(waste(size)), 9), size))


@dataclass(frozen=True)
class PageLayout:
    """Static geometry of a pool whose pages serve every tier of `formats`, most precise first.

    `scored`: whether tokens have a significance; `group`: how the scores that the query heads of a
    KV head's group give become one. `rope`: keys are stored without their rotary embedding of these
    frequencies (`rope.at_positions`), and get it back where they are read. `meta_dtype` is
    "float16", or "int16" where the same 16 bits are kept as integers: TPU kernels know no float16.

    `rows` uint8 payload rows and `meta_rows` float16 rows of `tokens` lanes; `blocks[tier]` blocks
    of `tokens` tokens fit one page. Within a page all K rows of all blocks come first, then all V
    rows; metadata likewise.
    """

    formats: tuple[KVFormat, ...]
    head_dim: int
    tokens: int
    rows: int
    blocks: tuple[int, ...]
    meta_rows: int
    position_dtype: str
    scored: bool
    meta_dtype: str = "float16"
    group: Literal["max", "mean"] = "max"
    rope: tuple[float, ...] | None = None

    @staticmethod
    def solve(
        formats: Sequence[KVFormat],
        head_dim: int,
        *,
        tokens: int = 32,
        max_len: int = 65536,
        scored: bool = True,
        meta_dtype: str = "float16",
        group: Literal["max", "mean"] = "max",
        rope: tuple[float, ...] | None = None,
    ) -> "PageLayout":
        """Choose `rows` of one to four of the largest blocks so that the worst tier wastes least.

        Raises:
            ValueError: a format cannot pack `head_dim`, or needs more payload than the first.
        """
        formats = [f.for_block(head_dim, tokens) for f in formats]
        block_rows = [sum(f.rows(head_dim)) for f in formats]

        def layout(rows: int) -> PageLayout:
            blocks = tuple(rows // need for need in block_rows)
            pairs = zip(blocks, formats, strict=True)
            meta_rows = max(n * (f.key.meta_rows + f.value.meta_rows) for n, f in pairs)
            meta_rows = _tile_rows(meta_rows, tokens)
            # a TPU kernel would copy uint16 [pages, 1, 128]
            narrow = max_len <= 65536 and (tokens, max(blocks)) != (128, 1)
            sizes = (head_dim, tokens, rows, blocks, meta_rows)
            kept = ("uint16" if narrow else "int32", scored, meta_dtype, group, rope)
            return PageLayout(tuple(formats), *sizes, *kept)

        if max(block_rows) > block_rows[0]:
            names = [f.name for f in formats]
            raise ValueError(
                f"tiers {names} take {block_rows} payload bytes a token at {head_dim=}; a lower "
                "tier must not take more"
            )
        sizes = range(max(block_rows), 4 * max(block_rows) + 1)
        return layout(least_waste(sizes, lambda rows: layout(rows).waste()))

    def native_formats(self) -> np.ndarray:
        """The tiers' codecs as `Layout::make` of native/pages.h reads them: int64 [tiers * 5]."""
        return native_formats(self.formats, self.blocks)

    @property
    def tiers(self) -> int:
        """Number of stored tiers."""
        return len(self.formats)

    @property
    def tokens_per_group(self) -> int:
        """Tokens encoded once as a block: T where a codec shares numbers over a block, else 1."""
        return 1 if all(fmt.separable for fmt in self.formats) else self.tokens

    @property
    def token_data_rows(self) -> int:
        """Rows of significance and of position of one page: its blocks, filled up for the TPU."""
        return _tile_rows(max(self.blocks), self.tokens)

    @property
    def token_data_bytes(self) -> int:
        """Bytes of significance and position of one token."""
        return (4 if self.scored else 0) + jnp.dtype(self.position_dtype).itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all arrays of the pool."""
        token_data = self.token_data_rows * self.token_data_bytes
        return self.tokens * (self.rows + 2 * self.meta_rows + token_data)

    def token_bytes(self, tier: int) -> int:
        """Bytes one token of a tier needs: payload, metadata, significance and position."""
        return self.formats[tier].token_bytes(self.head_dim) + self.token_data_bytes

    def tokens_per_page(self, tier: int) -> int:
        """Tokens of a tier that one page holds."""
        return self.blocks[tier] * self.tokens

    def pages_for(self, tier: int, length):
        """Pages that `length` tokens of a tier take (ints or arrays)."""
        return -(-length // self.tokens_per_page(tier))

    def waste(self) -> tuple[float, ...]:
        """Fraction of a full page that each tier leaves unused, all arrays counted."""
        return tuple(
            1 - self.tokens_per_page(t) * self.token_bytes(t) / self.page_bytes
            for t in range(self.tiers)
        )

    def value_start(self, tier: int) -> tuple[int, int]:
        """First payload row and first metadata row of V in a page of a tier: behind all of K."""
        (k_rows, _), count = self.formats[tier].rows(self.head_dim), self.blocks[tier]
        return count * k_rows, count * self.formats[tier].key.meta_rows

    def split(self, tier: int, payload: Array, meta: Array) -> Block:
        """Pages `[..., rows, T]`, `[..., meta_rows, T]` as the tier's blocks `[..., blocks, rows of
        one tensor, T]`, float16 metadata.
        """
        fmt, n = self.formats[tier], self.blocks[tier]
        (k_rows, v_rows), (v_start, v_meta_start) = fmt.rows(self.head_dim), self.value_start(tier)
        part, meta = partial(_blocks, n=n), jax.lax.bitcast_convert_type(meta, jnp.float16)
        return Block(
            part(payload, 0, k_rows),
            part(payload, v_start, v_rows),
            part(meta, 0, fmt.key.meta_rows),
            part(meta, v_meta_start, fmt.value.meta_rows),
        )

    def join(self, tier: int, block: Block, payload: Array, meta: Array) -> tuple[Array, Array]:
        """Inverse of `split`: the blocks laid over `payload`, `meta`, whose remaining rows stay."""
        new_payload = jnp.concatenate([_rows(block.k_payload), _rows(block.v_payload)], axis=-2)
        new_meta = jnp.concatenate([_rows(block.k_meta), _rows(block.v_meta)], axis=-2)
        new_meta = jax.lax.bitcast_convert_type(new_meta, meta.dtype)
        return (
            jnp.concatenate([new_payload, payload[..., new_payload.shape[-2] :, :]], axis=-2),
            jnp.concatenate([new_meta, meta[..., new_meta.shape[-2] :, :]], axis=-2),
        )


def _tile_rows(rows: int, tokens: int) -> int:
    """`rows`, at 128 lanes (TPU) rounded up to fill tiles: kernels would copy arrays of other row
    counts, whose layout differs.
    """
    if tokens != 128 or rows <= 2:
        return rows
    return 4 if rows <= 4 else -(-rows // 8) * 8


def _blocks(x: Array, first: int, rows: int, n: int) -> Array:
    """Rows `[first, first + n * rows)` of `[..., rows, T]` as `[..., n, rows, T]`."""
    return x[..., first : first + n * rows, :].reshape(*x.shape[:-2], n, rows, x.shape[-1])


def _rows(x: Array) -> Array:
    """`[..., n, rows, T]` as `[..., n * rows, T]`."""
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["payload", "meta", "significance", "position"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Pages:
    """The pool, shared by all layers, heads, requests and tiers. Page `num_pages` is nowhere: reads
    of it are clipped, writes dropped.
    """

    payload: Array  # uint8 [num_pages, rows, T]
    meta: Array  # float16 [num_pages, meta_rows, T], or its bits as int16: `PageLayout.meta_dtype`
    significance: Array  # float32 [num_pages, blocks, T]; [num_pages, 0, T] if not scored
    position: Array  # uint16 or int32 [num_pages, blocks, T]

    @staticmethod
    def zeros(layout: PageLayout, num_pages: int) -> "Pages":
        """An empty pool of `num_pages` pages."""
        blocks, lanes = layout.token_data_rows, layout.tokens
        return Pages(
            payload=jnp.zeros((num_pages, layout.rows, lanes), jnp.uint8),
            meta=jnp.zeros((num_pages, layout.meta_rows, lanes), layout.meta_dtype),
            significance=jnp.zeros((num_pages, blocks if layout.scored else 0, lanes), jnp.float32),
            position=jnp.zeros((num_pages, blocks, lanes), layout.position_dtype),
        )

    @property
    def num_pages(self) -> int:
        """Capacity of the pool in pages."""
        return self.payload.shape[0]


def page_column(tier: int, index, max_pages: int):
    """Column of page `index` of a tier in a page table: tier 0 from the left, any other right."""
    return index if tier == 0 else max_pages - 1 - index


def tier_page_ids(page_table: Array, tier: int, first, count: int) -> Array:
    """Ids `[..., count]` of pages `first, first + 1, ...` of a tier. `page_table [..., max_pages]`,
    `first [...]` or scalar.
    """
    max_pages = page_table.shape[-1]
    index = jnp.asarray(first)[..., None] + jnp.arange(count)
    column = jnp.broadcast_to(page_column(tier, index, max_pages), (*page_table.shape[:-1], count))
    return jnp.take_along_axis(page_table, jnp.clip(column, 0, max_pages - 1), axis=-1)


def read_token_array(
    array: Array, layout: PageLayout, page_table: Array, tier: int, capacity: int
) -> Array:
    """Significance or position of a tier of each head in slot order, `[B, capacity]`; what lies
    beyond the tier's length is meaningless.

    `array [num_pages, blocks, T]`, `page_table [B, max_pages]`; `capacity` is a whole number of
    pages.
    """
    if array.shape[1] == 0:  # the policy does not score
        return jnp.zeros((page_table.shape[0], capacity), array.dtype)
    ids = tier_page_ids(page_table, tier, 0, capacity // layout.tokens_per_page(tier))
    rows = array.at[ids].get(mode="clip")[:, :, : layout.blocks[tier]]
    return rows.reshape(page_table.shape[0], -1)


def read_token_data(
    pages: "Pages", layout: PageLayout, page_table: Array, tier_len: Array, tier: int, max_len: int
) -> tuple[Array, Array, Array]:
    """Significance and position of a tier of each head, and where there is a token: `[B, capacity]`
    each, in slot order.
    """
    capacity = layout.pages_for(tier, max_len) * layout.tokens_per_page(tier)
    read = partial(
        read_token_array, layout=layout, page_table=page_table, tier=tier, capacity=capacity
    )
    significance, position = read(pages.significance), read(pages.position)
    return significance, position, jnp.arange(capacity) < tier_len[:, tier, None]


def write_token_array(
    array: Array, layout: PageLayout, page_table: Array, tier: int, length: Array, values: Array
) -> Array:
    """Inverse of `read_token_array`: `array` with a tier's tokens of each head set to `values [B,
    capacity]`; pages beyond `length [B]` stay.
    """
    pages = values.shape[1] // layout.tokens_per_page(tier)
    ids = tier_page_ids(page_table, tier, 0, pages)
    held = jnp.arange(pages) < layout.pages_for(tier, length)[:, None]
    ids = jnp.where(held, ids, array.shape[0])
    rows = values.reshape(*ids.shape, layout.blocks[tier], layout.tokens).astype(array.dtype)
    return array.at[ids, : layout.blocks[tier]].set(rows, mode="drop")


def meta_as_bits(meta: Array) -> Array:
    """The metadata as int16 bits for a TPU kernel: no copy where `meta_dtype` keeps it so."""
    return meta if meta.dtype == jnp.int16 else jax.lax.bitcast_convert_type(meta, jnp.int16)


def meta_like(bits: Array, meta: Array) -> Array:
    """Inverse of `meta_as_bits`, in the dtype of `meta`."""
    return bits if meta.dtype == jnp.int16 else jax.lax.bitcast_convert_type(bits, meta.dtype)
