"""The TPU kernel of decode attention: what one program does for one head."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..codecs.halves import half_to_float
from .mosaic_tpu_block import StoredBlock, logits_of, matmul, mix_of, runs_of
from .mosaic_tpu_stream import Plan, Refs, Stream
from .stream import group_score, soft_cap


class Softmax(NamedTuple):
    """Softmax of some keys: maximum, sum `[G, 1]`, output without divisor `[G, d]`, float32."""

    maximum: Array
    total: Array
    output: Array

    def add(self, logits: Array, mix: Callable[[Array], Array]) -> "Softmax":
        """Take in keys with `logits [G, n]`, masked ones -inf; `mix(weights)` multiplies weights of
        that shape with the values.
        """
        maximum = jnp.maximum(self.maximum, logits.max(axis=1, keepdims=True))
        safe = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        weights, rescale = jnp.exp(logits - safe), jnp.exp(self.maximum - safe)
        return Softmax(
            maximum,
            self.total * rescale + weights.sum(axis=1, keepdims=True),
            self.output * rescale + mix(weights),
        )

    def normalised(self) -> tuple[Array, Array]:
        """Output `[G, d]` and log-sum-exp `[G, 1]`; zeros and +inf where there was no key, so that
        `exp(logit - lse)` is 0.
        """
        some = self.total > 0
        total = jnp.where(some, self.total, 1.0)
        output, maximum = self.output / total, jnp.where(some, self.maximum, 0.0)
        return output, jnp.where(some, maximum + jnp.log(total), jnp.inf)


def attend_head(*refs, names: tuple[str, ...], plan: Plan) -> None:
    """One head: attention of its G query heads over window and pages, then their significance.

    DiffKV, arXiv 2412.03131 sec. 4 and 6. Of the pool it reads the head's live pages whole and
    once: payload, metadata, where needed positions; when scored it reads their significance and
    writes it back, lanes that are not live with the bits they had. Bytes of a page: T (rows + 2
    meta_rows), when scored + 8 T blocks. Pages of later heads are on their way meanwhile
    (`Stream`).
    """
    r = Refs(**dict(zip(names, refs, strict=True)))
    first = pl.program_id(0) * plan.heads
    head = first + pl.program_id(1)
    stream = Stream(r, plan, first + plan.heads)
    pl.when(head == first)(lambda: stream.open(first))
    for which, table in r.tables.items():
        numbers = table[...]
        if numbers.dtype == jnp.int16:
            numbers = half_to_float(numbers.astype(jnp.int32))
        # no code names the lanes behind
        r.levels[which][:, : table.shape[1]] = numbers.astype(jnp.float32)

    group, head_dim = r.q.shape
    state = Softmax(
        jnp.full((group, 1), -jnp.inf), jnp.zeros((group, 1)), jnp.zeros((group, head_dim))
    )
    recent_logits, mix = _recent(r, plan, head)
    state = state.add(recent_logits, mix)
    for tier in range(plan.layout.tiers):
        chunks = stream.chunks(head, tier)
        state = lax.fori_loop(0, chunks, _chunk_step(r, plan, stream, head, tier), state)
    r.output[...], lse = state.normalised()
    if plan.layout.scored:
        r.recent_scores[...] = group_score(recent_logits, lse, plan.layout, keepdims=True)
        _score_pages(r, plan, stream, head, lse)
    else:
        r.recent_scores[...] = jnp.zeros(r.recent_scores.shape)


def _recent(r: Refs, plan: Plan, head) -> tuple[Array, Callable[[Array], Array]]:
    """Logits `[G, N]` of the recent window and the product of weights with its values."""
    slots, length = r.recent_k.shape[0], r.recent_len[head]
    slot = lax.broadcasted_iota(jnp.int32, (1, slots), 1)
    seen = slot < length
    if plan.window is not None:
        seen &= length - 1 - slot < plan.window
    logits = soft_cap(matmul(r.q[...], r.recent_k[...], (1, 1)) * plan.sm_scale, plan.soft_cap)
    live = lax.broadcasted_iota(jnp.int32, (slots, 1), 0) < length
    values = jnp.where(live, r.recent_v[...].astype(jnp.float32), 0.0)

    def mix(weights: Array) -> Array:
        return matmul(weights.astype(r.q.dtype), values, (1, 0))

    return jnp.where(seen, logits, -jnp.inf), mix


def _live(r: Refs, plan: Plan, head, tier: int, chunk) -> Array:
    """Which tokens `[1, n]` of a chunk there are."""
    tokens = plan.chunk_tokens(tier)
    return chunk * tokens + lax.broadcasted_iota(jnp.int32, (1, tokens), 1) < r.tier_len[head, tier]


def _blocks(plan: Plan, tier: int) -> Iterator[tuple[int, int, slice]]:
    """(page of the chunk, block of the page, tokens of the chunk) of every block."""
    count, tokens = plan.layout.blocks[tier], plan.layout.tokens
    for i in range(plan.pages[tier] * count):
        yield i // count, i % count, slice(i * tokens, (i + 1) * tokens)


def _first_block(plan: Plan, stream: Stream, head, tier: int, chunk):
    """Where among the kept logits of a head those of a chunk begin."""
    before = 0 if tier == 0 else stream.chunks(head, 0) * (plan.pages[0] * plan.layout.blocks[0])
    return before + chunk * (plan.pages[tier] * plan.layout.blocks[tier])


def _chunk_step(r: Refs, plan: Plan, stream: Stream, head, tier: int) -> Callable:
    """The body of the loop over the chunks of a tier."""
    layout, codecs = plan.layout, plan.layout.formats[tier]
    k_runs, v_runs = (runs_of(codec, layout.head_dim) for codec in (codecs.key, codecs.value))
    queries = [r.q[:, run.channels] for run in k_runs]
    sums = [q.astype(jnp.float32).sum(axis=1, keepdims=True) for q in queries]

    def body(chunk, state: Softmax) -> Softmax:
        buffer = stream.next(head, tier, chunk)
        if layout.scored:
            _read_scores(r, stream, head, tier, chunk)
        live = _live(r, plan, head, tier, chunk)
        of_chunk = partial(StoredBlock, r, plan, tier, buffer)
        blocks = [of_chunk(page, block) for page, block, _ in _blocks(plan, tier)]
        parts = [logits_of(block, k_runs, queries, sums) for block in blocks]
        logits = jnp.concatenate(parts, axis=1)
        logits = jnp.where(live, soft_cap(logits * plan.sm_scale, plan.soft_cap), -jnp.inf)
        if plan.window is not None:
            position = jnp.concatenate([block.position() for block in blocks], axis=1)
            logits = jnp.where(position > r.query_position[head] - plan.window, logits, -jnp.inf)
        if layout.scored:
            first = _first_block(plan, stream, head, tier, chunk)
            for i, (_, _, tokens) in enumerate(_blocks(plan, tier)):
                r.logits[first + i] = logits[:, tokens]

        def mix(weights: Array) -> Array:
            parts = [
                mix_of(b, v_runs, weights[:, t], live[:, t], r.q.dtype)
                for b, (_, _, t) in zip(blocks, _blocks(plan, tier), strict=True)
            ]
            sums = [sum(part[1:], start=part[0]) for part in zip(*parts, strict=True)]
            return jnp.concatenate(sums, axis=1)

        return state.add(logits, mix)

    return body


def _read_scores(r: Refs, stream: Stream, head, tier: int, chunk) -> None:
    """Ask for the significance of the pages of a chunk."""
    near = r.scores.at[lax.rem(head, 2)]
    first = stream.first_page(head, tier) + chunk * stream.plan.pages[tier]

    def read(i, page) -> None:
        far = r.significance.at[page]
        pltpu.make_async_copy(far, near.at[first + i], r.scores_read).start()

    stream.each_page(head, tier, chunk, read)


def _score_pages(r: Refs, plan: Plan, stream: Stream, head, lse: Array) -> None:
    """Add the probabilities of kept logits to the significance of the head's pages, back in HBM.

    The head waits for what the head before it has sent, and only the last head of a core for its
    own.
    """
    near = r.scores.at[lax.rem(head, 2)]

    def wait(of_head, semaphore) -> None:
        """For all pages at once: copies that share a semaphore may end in any order."""
        for tier in range(plan.layout.tiers):

            @pl.loop(0, stream.chunks(of_head, tier))
            def _(chunk, tier=tier):
                copy = pltpu.make_async_copy(r.significance.at[0], near.at[0], semaphore)
                stream.each_page(of_head, tier, chunk, lambda *_: copy.wait())

    def score_chunk(tier: int):
        def body(chunk, _):
            first_block = _first_block(plan, stream, head, tier, chunk)
            live = _live(r, plan, head, tier, chunk)
            first_page = stream.first_page(head, tier) + chunk * plan.pages[tier]
            for i, (page, block, tokens) in enumerate(_blocks(plan, tier)):
                at = (first_page + page, pl.ds(block, 1))
                scores = group_score(r.logits[first_block + i], lse, plan.layout, keepdims=True)
                near[at] = jnp.where(live[:, tokens], near[at] + scores, near[at])

            def write(i, page) -> None:
                far = r.significance.at[page]
                pltpu.make_async_copy(near.at[first_page + i], far, r.scores_written).start()

            stream.each_page(head, tier, chunk, write)
            return 0

        lax.fori_loop(0, stream.chunks(head, tier), body, 0)

    pl.when(head > stream.end - plan.heads)(lambda: wait(head - 1, r.scores_written))
    wait(head, r.scores_read)
    for tier in range(plan.layout.tiers):
        score_chunk(tier)
    pl.when(head == stream.end - 1)(lambda: wait(head, r.scores_written))
