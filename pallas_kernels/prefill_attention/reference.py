"""Attention of a prompt chunk over prefix, recent window and itself, and its column sums."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from ..decode_attention.reference import Heads
from ..decode_attention.stream import (
    Partial,
    Scale,
    chunk_logits,
    chunk_mix,
    over_chunks,
    read_chunk,
    soft_cap,
)
from ..pages import PageLayout, Pages

# rows of queries and of chunk keys that one step holds; BLOCK_Q divides or exceeds the chunk
BLOCK_Q, BLOCK_KV = 512, 512


class Chunk(NamedTuple):
    """A prompt chunk of C tokens of each of `B` heads, right-aligned: the last `length` count."""

    q: Array  # float32 or bfloat16 [B, G, C, d]
    k: Array  # like q [B, C, d], zeros where padded
    v: Array  # like q [B, C, d], zeros where padded; no channels where keys serve as values
    length: Array  # int32 [B]

    def float32(self) -> "Chunk":
        """The same in float32."""
        q, k, v = (x.astype(jnp.float32) for x in (self.q, self.k, self.v))
        return Chunk(q, k, v, self.length)


class Exact(NamedTuple):
    """Exact keys before the chunk (the recent window), with their mask."""

    k: Array  # float32 [B, n, d]
    v: Array  # float32 [B, n, d]
    valid: Array  # bool [B, n]


def recent_keys(heads: Heads) -> Exact:
    """The recent window in float32, dead slots zeroed."""
    return Exact(*heads.recent())


def prefill_attention(
    chunk: Chunk, pages: Pages, layout: PageLayout, heads: Heads, scale: Scale
) -> tuple[Array, Array]:
    """`prefill_attention` of api.py in plain jax.numpy.

    Works in blocks of rows, so that no `C x C` matrix exists; the chunk's own keys above the
    diagonal blocks are never visited.
    """
    chunk = chunk.float32()
    b, g, c, d = chunk.q.shape
    rows = min(BLOCK_Q, c)
    recent, values = recent_keys(heads), layout.formats[0].values
    chunk = chunk._replace(v=values(chunk.k, chunk.v))
    recent = recent._replace(v=values(recent.k, recent.v))

    def block(i):
        q = lax.dynamic_slice_in_dim(chunk.q, i * rows, rows, axis=2).reshape(b, g * rows, d)
        partial = Partial.empty(q.shape[:2], chunk.v.shape[-1])
        for tier in range(layout.tiers):
            partial = _add_tier(partial, q, pages, layout, tier, heads, scale)
        partial = partial.add(
            exact_logits(q, recent, scale), lambda p: jnp.einsum("bqt,btd->bqd", p, recent.v)
        )
        partial = _add_own(partial, q, chunk, i * rows, rows, scale)
        out, lse = partial.normalised()
        return out.reshape(b, g, rows, -1), lse.reshape(b, g, rows)

    out, lse = lax.map(block, jnp.arange(c // rows))
    return jnp.moveaxis(out, 0, 2).reshape(b, g, c, -1), jnp.moveaxis(lse, 0, 2).reshape(b, g, c)


def exact_logits(q: Array, keys: Exact, scale: Scale) -> Array:
    """Logits `[B, Q, n]` of `q [B, Q, d]` against exact keys."""
    logits = soft_cap(jnp.einsum("bqd,btd->bqt", q, keys.k) * scale.sm_scale, scale.soft_cap)
    return jnp.where(keys.valid[:, None], logits, -jnp.inf)


def _add_tier(
    partial: Partial, q: Array, pages, layout, tier, heads: Heads, scale: Scale
) -> Partial:
    def body(i, partial):
        part = read_chunk(pages, layout, tier, heads.page_table, heads.tier_len, i)
        logits = chunk_logits(q, part, layout, tier, scale.sm_scale, scale.soft_cap)
        return partial.add(logits, lambda p: chunk_mix(p, part, layout, tier))

    return over_chunks(layout, tier, heads.tier_len, body, partial)


def _add_own(
    partial: Partial, q: Array, chunk: Chunk, first_row, rows: int, scale: Scale
) -> Partial:
    """Causal attention of rows `first_row ...` over the chunk's keys, blockwise to the diagonal."""
    c = chunk.k.shape[1]
    width = min(BLOCK_KV, c)

    def body(i, partial):
        k, v = (lax.dynamic_slice_in_dim(x, i * width, width, axis=1) for x in (chunk.k, chunk.v))
        logits = own_logits(q, k, i * width, first_row, rows, chunk, scale)
        return partial.add(logits, lambda p: jnp.einsum("bqt,btd->bqd", p, v))

    return lax.fori_loop(0, (first_row + rows + width - 1) // width, body, partial)


def own_logits(
    q: Array, k: Array, first_key, first_row, rows: int, chunk: Chunk, scale: Scale
) -> Array:
    """Logits of `q [B, G * rows, d]` (rows `first_row ...`) against chunk keys `first_key ...`,
    causal and padding masked.
    """
    logits = soft_cap(jnp.einsum("bqd,btd->bqt", q, k) * scale.sm_scale, scale.soft_cap)
    row = first_row + jnp.arange(rows)
    key = first_key + jnp.arange(k.shape[1])
    # [B, rows, keys]
    valid = (key <= row[:, None]) & (key >= chunk.k.shape[1] - chunk.length[:, None, None])
    valid = jnp.broadcast_to(valid[:, None], (q.shape[0], q.shape[1] // rows, *valid.shape[1:]))
    return jnp.where(valid.reshape(logits.shape), logits, -jnp.inf)
