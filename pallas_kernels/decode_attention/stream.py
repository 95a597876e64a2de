"""Online softmax over the pages of a tier: the loop that decode and prefill attention share."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..codecs import Block
from ..pages import PageLayout, Pages, tier_page_ids
from ..rope import at_positions

CHUNK_TOKENS = 512  # of one head a step of the loop: about a cache's worth of decoded keys


class Partial(NamedTuple):
    """Softmax over part of the keys: maximum, sum of exponentials, unnormalised output, float32."""

    maximum: Array  # [..., G]
    total: Array  # [..., G]
    output: Array  # [..., G, d]

    @staticmethod
    def empty(shape: tuple[int, ...], head_dim: int) -> "Partial":
        """No keys yet."""
        return Partial(
            jnp.full(shape, -jnp.inf, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, head_dim), jnp.float32),
        )

    def add(self, logits: Array, mix: Callable[[Array], Array]) -> "Partial":
        """Take in keys with `logits [..., G, n]`, masked ones -inf; `mix(p)` multiplies weights of
        that shape with the values.
        """
        maximum = jnp.maximum(self.maximum, logits.max(axis=-1))
        safe = jnp.where(jnp.isfinite(maximum), maximum, 0.0)
        weights = jnp.exp(logits - safe[..., None])
        rescale = jnp.exp(self.maximum - safe)
        return Partial(
            maximum,
            self.total * rescale + weights.sum(axis=-1),
            self.output * rescale[..., None] + mix(weights),
        )

    def normalised(self) -> tuple[Array, Array]:
        """Output `[..., G, d]` and log-sum-exp `[..., G]`; zeros and +inf where there was no key,
        so that `exp(logit - lse)` is 0.
        """
        some = self.total > 0
        output = self.output / jnp.where(some, self.total, 1.0)[..., None]
        safe_max = jnp.where(some, self.maximum, 0.0)
        lse = safe_max + jnp.log(jnp.where(some, self.total, 1.0))
        return output, jnp.where(some, lse, jnp.inf)


class Scale(NamedTuple):
    """What turns dot products into logits."""

    sm_scale: float
    soft_cap: float | None


def soft_cap(logits: Array, cap: float | None) -> Array:
    """`cap * tanh(logits / cap)`, as Gemma 2 has it; identity when None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def group_score(logits: Array, lse: Array, layout: PageLayout, keepdims: bool = False) -> Array:
    """Probability of each key, maximum or mean over the query heads of the group.

    `logits [..., G, n]`, `lse [..., G, 1]` to `[..., n]`, with `keepdims` `[..., 1, n]`.
    """
    relative = logits - lse
    if layout.group == "max":
        return jnp.exp(relative.max(axis=-2, keepdims=keepdims))
    return jnp.exp(relative).mean(axis=-2, keepdims=keepdims)


class PageChunk(NamedTuple):
    """Some pages of a tier of each head as one long block of `lanes` tokens."""

    ids: Array  # int32 [B, pages]
    block: Block  # [B, rows, lanes]
    valid: Array  # bool [B, lanes]
    position: Array  # int32 [B, lanes]


def chunk_pages(layout: PageLayout, tier: int) -> int:
    """Pages that one step of the loop reads."""
    return max(1, CHUNK_TOKENS // layout.tokens_per_page(tier))


def num_chunks(layout: PageLayout, tier: int, tokens):
    """Steps of the loop that `tokens` tokens of a tier take (ints or arrays)."""
    return -(-layout.pages_for(tier, tokens) // chunk_pages(layout, tier))


def read_chunk(
    pages: Pages, layout: PageLayout, tier: int, page_table: Array, tier_len: Array, chunk: Array
) -> PageChunk:
    """Chunk `chunk` of a tier of each head; `page_table [B, max_pages]`, `tier_len [B, tiers]`."""
    n = chunk_pages(layout, tier)
    return read_pages(pages, layout, tier, page_table, tier_len, chunk * n, n)


def read_pages(
    pages: Pages,
    layout: PageLayout,
    tier: int,
    page_table: Array,
    tier_len: Array,
    first: Array,
    n: int,
) -> PageChunk:
    """`n` pages of a tier of each head, from number `first` int32 [] on."""
    lanes = n * layout.tokens_per_page(tier)
    ids = tier_page_ids(page_table, tier, jnp.full(page_table.shape[:1], first, jnp.int32), n)
    payload, meta = (array.at[ids].get(mode="clip") for array in (pages.payload, pages.meta))
    block = layout.split(tier, payload, meta)
    rows_first = (
        jnp.moveaxis(part, 3, 1).reshape(part.shape[0], part.shape[3], lanes) for part in block
    )
    position = pages.position.at[ids].get(mode="clip")[:, :, : layout.blocks[tier]]
    position = position.astype(jnp.int32).reshape(-1, lanes)
    slot = first * layout.tokens_per_page(tier) + jnp.arange(lanes)
    return PageChunk(ids, Block(*rows_first), slot < tier_len[:, tier, None], position)


def chunk_logits(
    q: Array, chunk: PageChunk, layout: PageLayout, tier: int, sm_scale: float, cap: float | None
) -> Array:
    """Logits `[B, G, lanes]` of `q [B, G, d]` against a chunk, -inf where not valid."""
    if layout.rope is None:
        logits = layout.formats[tier].key_logits(q, chunk.block)
    else:
        logits = jnp.einsum("bgd,btd->bgt", q, chunk_tokens(chunk, layout, tier)[0])
    return jnp.where(chunk.valid[:, None], soft_cap(logits * sm_scale, cap), -jnp.inf)


def chunk_tokens(chunk: PageChunk, layout: PageLayout, tier: int) -> tuple[Array, Array]:
    """K and V of a chunk, float32 `[B, lanes, d]`; what is not valid is meaningless."""
    k, v = (jnp.swapaxes(x, -1, -2) for x in layout.formats[tier].decode(chunk.block))
    return k if layout.rope is None else at_positions(k, chunk.position, layout.rope), v


def chunk_mix(weights: Array, chunk: PageChunk, layout: PageLayout, tier: int) -> Array:
    """`weights [B, G, lanes]` times the values of a chunk, `[B, G, d]`."""
    return layout.formats[tier].value_mix(weights, chunk.block, chunk.valid)


def add_significance(
    significance: Array, chunk: PageChunk, layout: PageLayout, tier: int, scores: Array
) -> Array:
    """Add `scores [B, lanes]` (0 where not valid) to the significance of a chunk's pages."""
    shape = (*chunk.ids.shape, layout.blocks[tier], layout.tokens)
    ids = jnp.where(chunk.valid.reshape(shape).any(axis=(-1, -2)), chunk.ids, significance.shape[0])
    unused = significance.shape[1] - shape[2]
    padded = jnp.pad(scores.reshape(shape), ((0, 0), (0, 0), (0, unused), (0, 0)))
    return significance.at[ids].add(padded, mode="drop")


def over_chunks(layout: PageLayout, tier: int, tier_len: Array, body: Callable, state):
    """`state = body(chunk, state)` for every chunk that some head has."""
    return lax.fori_loop(0, num_chunks(layout, tier, tier_len[:, tier].max()), body, state)
