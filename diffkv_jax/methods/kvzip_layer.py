"""Scores of one layer while the prompt is gone over again (KVzip, arXiv:2505.23416): the largest
attention that a token ever gets.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import per_head
from diffkv_jax.pallas_kernels.decode_attention import Heads
from diffkv_jax.pallas_kernels.decode_attention.stream import (
    PageChunk,
    Scale,
    add_significance,
    chunk_tokens,
    read_pages,
)
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.pallas_kernels.prefill_attention import Chunk
from diffkv_jax.pallas_kernels.prefill_attention.reference import (
    Exact,
    exact_logits,
    own_logits,
    recent_keys,
)
from diffkv_jax.steps.step import ReplayStep

BLOCK_ROWS = 64  # rows of the pass that one step holds


def score_replayed(
    cache: KVCache, layout: PageLayout, chunk: Chunk, heads: Heads, scale: Scale, step: ReplayStep
) -> KVCache:
    """The cache with the scores of the stored tokens of a layer that this pass repeats; nothing
    else changes.

    `S_t = max_i softmax_u(q_i . k_u)[t]`, over all queries i of the pass and the query heads of the
    group (`PageLayout.group`: their mean instead). u runs over the sinks, the repeated part of the
    prompt and, causally, the pass itself: not over the rest of the prompt, as the attention does
    that the pass goes on with. Keys are those that attention reads, quantised ones too. Plain XLA,
    whatever the kernels; a matrix of `BLOCK_ROWS` rows exists at a time.

    Before anything has been dropped a token's slot in the first tier is its position, so that the
    pages to be read are known.
    """
    replay = cache.spec.selection.replay
    assert replay is not None  # `prefill` makes no other passes
    per_page = layout.tokens_per_page(0)
    spanned = min(-(-replay.chunk // per_page) + 1, layout.pages_for(0, cache.spec.max_len))
    part = _first_tier(cache, layout, heads, step.first // per_page, spanned)
    start = _first_tier(
        cache, layout, heads, jnp.int32(0), max(1, layout.pages_for(0, cache.spec.selection.sinks))
    )
    keys = _before_the_pass(cache, layout, heads, step, (part, start))
    best = _largest(chunk, keys, scale)[..., : part.valid.shape[1]]
    scores = best.max(axis=1) if layout.group == "max" else best.mean(axis=1)
    # was 0, or that of a protected token
    significance = add_significance(cache.pages.significance, part, layout, 0, scores)
    return dataclasses.replace(
        cache, pages=dataclasses.replace(cache.pages, significance=significance)
    )


def _first_tier(
    cache: KVCache, layout: PageLayout, heads: Heads, first: Array, pages: int
) -> PageChunk:
    return read_pages(cache.pages, layout, 0, heads.page_table, heads.tier_len, first, pages)


def _before_the_pass(
    cache: KVCache,
    layout: PageLayout,
    heads: Heads,
    step: ReplayStep,
    stored: tuple[PageChunk, PageChunk],
) -> Exact:
    """The keys of the repeated part and the sinks: of the pages `stored` (the part's, the sinks')
    and the recent window; no values.
    """
    selection, recent = cache.spec.selection, recent_keys(heads)
    assert selection.replay is not None
    end = step.first + selection.replay.chunk
    position = per_head(cache, cache.seq_len - cache.recent_len)[:, None] + jnp.arange(
        recent.valid.shape[1]
    )

    def repeated(position: Array) -> Array:
        return (position >= step.first) & (position < end)

    def sink(position: Array) -> Array:
        return position < jnp.minimum(selection.sinks, step.first)

    part, start = stored
    valid = (
        part.valid & repeated(part.position),
        start.valid & sink(start.position),
        recent.valid & (repeated(position) | sink(position)),
    )
    k = jnp.concatenate(
        [chunk_tokens(part, layout, 0)[0], chunk_tokens(start, layout, 0)[0], recent.k], axis=1
    )
    return Exact(k, k[..., :0], jnp.concatenate(valid, axis=1))


def _largest(chunk: Chunk, keys: Exact, scale: Scale) -> Array:
    """The largest probability `[B, G, n]` that any row of the pass gives each of `keys [B, n]`,
    softmax over these and its own ones.
    """
    chunk = chunk.float32()
    b, g, c, d = chunk.q.shape
    rows, n = min(BLOCK_ROWS, c), keys.k.shape[1]

    def block(i: Array, best: Array) -> Array:
        q = lax.dynamic_slice_in_dim(chunk.q, i * rows, rows, axis=2).reshape(b, g * rows, d)
        logits = jnp.concatenate(
            [exact_logits(q, keys, scale), own_logits(q, chunk.k, 0, i * rows, rows, chunk, scale)],
            axis=2,
        )
        relative = (logits[..., :n] - jax.nn.logsumexp(logits, axis=2, keepdims=True)).reshape(
            b, g, rows, n
        )
        real = i * rows + jnp.arange(rows) >= c - chunk.length[:, None]
        return jnp.maximum(best, jnp.where(real[:, None, :, None], relative, -jnp.inf).max(axis=2))

    first = (c - chunk.length.max()) // rows
    return jnp.exp(lax.fori_loop(first, c // rows, block, jnp.full((b, g, n), -jnp.inf)))
