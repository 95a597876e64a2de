"""KVzip (arXiv:2505.23416): the largest attention that a token gets while the model repeats the
prompt; one threshold for the heads of all layers.
"""

from collections.abc import Iterator
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.batching import power_of_two, right_aligned
from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.methods.replay import Replay
from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.decode_attention.stream import (
    PageChunk,
    Scale,
    add_significance,
    chunk_tokens,
    read_pages,
)
from diffkv_jax.pallas_kernels.prefill_attention import Chunk
from diffkv_jax.pallas_kernels.prefill_attention.reference import (
    Exact,
    exact_logits,
    own_logits,
    recent_keys,
)
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import KeyScore, Pass, PassLayer
from diffkv_jax.policy.stage import data, from_mapping

BLOCK_ROWS = 64  # rows of a pass that one step holds
PASS_ROWS = 512  # a pass of more rows has a multiple of them, as attention wants


class ContextReconstruction(KeyScore):
    """`S_t = max_i softmax_u(q_i . k_u)[t]`, over all queries i that repeat token t and the query
    heads of the group (with `reduce` "mean" their mean). u runs over the sinks, the repeated part
    of the prompt and, causally, the pass itself: not over the rest of the prompt, as the attention
    does that the pass goes on with.

    Attributes:
        replay: in which words the model is asked to repeat the prompt, and in which chunks.
    """

    replay: Replay = data(
        default=Replay(), convert=lambda name, value: from_mapping(name, value, Replay)
    )

    def check_prompts(self, attention: AttentionSpec, lengths: np.ndarray) -> None:
        self.replay.check_prompts(attention, lengths)

    def passes(self, tokens: np.ndarray, lengths: np.ndarray) -> Iterator[Pass]:
        replay, starts = self.replay, range(0, int(lengths.max()), self.replay.chunk)
        prompts = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
        passes = [[replay.row(prompt, at) for prompt in prompts] for at in starts]
        longest = max(len(row) for rows in passes for row in rows)
        width = power_of_two(longest)
        if longest > PASS_ROWS:
            width = -(-longest // PASS_ROWS) * PASS_ROWS
        for at, rows in zip(starts, passes, strict=True):
            real = np.array([len(row) for row in rows], np.int32)
            yield Pass(right_aligned(rows, width), real, at)

    def score_pass(self, layer: PassLayer) -> Array:
        """Keys are those that attention reads, quantised ones too. Plain XLA, whatever the kernels;
        a matrix of `BLOCK_ROWS` rows exists at a time.

        Before anything has been dropped a token's slot in the first tier is its position, so that
        the pages to be read are known.
        """
        layout, per_page = layer.layout, layer.layout.tokens_per_page(0)
        spanned = -(-self.replay.chunk // per_page) + 1
        spanned = min(spanned, layout.pages_for(0, layer.max_len))
        part = _first_tier(layer, layer.first // per_page, spanned)
        start = _first_tier(layer, jnp.int32(0), max(1, layout.pages_for(0, layer.sinks)))
        keys = self._keys(layer, part, start)
        best = _largest(layer.chunk, keys, layer.scale)[..., : part.valid.shape[1]]
        scores = best.max(axis=1) if layout.group == "max" else best.mean(axis=1)
        # was 0, or that of a protected token
        return add_significance(layer.pages.significance, part, layout, 0, scores)

    def _keys(self, layer: PassLayer, part: PageChunk, start: PageChunk) -> Exact:
        """The keys of the repeated part and the sinks: of the part's pages, those from the `start`
        and the recent window; no values.
        """
        recent, end = recent_keys(layer.heads), layer.first + self.replay.chunk
        slot = jnp.arange(recent.valid.shape[1])
        position = (layer.seq_len - layer.heads.recent_len)[:, None] + slot

        def repeated(position: Array) -> Array:
            return (position >= layer.first) & (position < end)

        def sink(position: Array) -> Array:
            return position < jnp.minimum(layer.sinks, layer.first)

        valid = (
            part.valid & repeated(part.position),
            start.valid & sink(start.position),
            recent.valid & (repeated(position) | sink(position)),
        )
        stored = (chunk_tokens(pages, layer.layout, 0)[0] for pages in (part, start))
        k = jnp.concatenate([*stored, recent.k], axis=1)
        return Exact(k, k[..., :0], jnp.concatenate(valid, axis=1))


def _first_tier(layer: PassLayer, first: Array, pages: int) -> PageChunk:
    heads = layer.heads
    table, lengths = heads.page_table, heads.tier_len
    return read_pages(layer.pages, layer.layout, 0, table, lengths, first, pages)


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


def kvzip(
    keep: Amount = 0.5, *, replay: Replay | None = None, **options: Unpack[Options]
) -> CompressionPolicy:
    """KVzip. Decides once, after the first prompt of a request: what comes later stays.

    `replay` says in which words the model is asked to repeat the prompt
    (`diffkv_jax.replay_words`), and in which chunks.
    """
    score = ContextReconstruction(replay=Replay() if replay is None else replay)
    budget = Budget(keep=keep, share_heads=0.0, share_layers=True)
    return evicting("kvzip", score, budget, **options)
