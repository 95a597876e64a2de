"""The TPU kernel of decode attention: what one program does for one head."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..codecs.tiles import Tile, half_to_float
from .mosaic_tpu_stream import Plan, Refs, Stream
from .stream import group_score, soft_cap


class Softmax(NamedTuple):
    """Softmax over part of the keys: maximum and sum of exponentials `[G, 1]`, output without its divisor `[G, d]`, float32."""

    maximum: Array
    total: Array
    output: Array

    def add(self, logits: Array, mix: Callable[[Array], Array]) -> "Softmax":
        """Take in keys with `logits [G, n]`, masked ones -inf; `mix(weights)` multiplies weights of that shape with the values."""
        maximum = jnp.maximum(self.maximum, logits.max(axis=1, keepdims=True))
        safe = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        weights, rescale = jnp.exp(logits - safe), jnp.exp(self.maximum - safe)
        return Softmax(maximum, self.total * rescale + weights.sum(axis=1, keepdims=True), self.output * rescale + mix(weights))

    def normalised(self) -> tuple[Array, Array]:
        """Output `[G, d]` and log-sum-exp `[G, 1]`; zeros and +inf where there was no key, so that `exp(logit - lse)` is 0."""
        some = self.total > 0
        total = jnp.where(some, self.total, 1.0)
        return self.output / total, jnp.where(some, jnp.where(some, self.maximum, 0.0) + jnp.log(total), jnp.inf)


def attend_head(*refs, names: tuple[str, ...], plan: Plan) -> None:
    """One head: softmax attention of its G query heads over its window and its pages, then the significance of its pages.

    DiffKV, arXiv 2412.03131 sec. 4 and 6. Of the pool it reads the head's live pages whole and once: payload, metadata, with a sliding
    window positions; when scored it reads their significance and writes it back, lanes that are not live with the bits they had.
    Bytes of a page: T (rows + 2 meta_rows), when scored + 8 T blocks. Pages of later heads are on their way meanwhile (`Stream`).
    """
    r = Refs(**dict(zip(names, refs, strict=True)))
    first = pl.program_id(0) * plan.heads
    head = first + pl.program_id(1)
    stream = Stream(r, plan, first + plan.heads)
    pl.when(head == first)(lambda: stream.open(first))

    group, head_dim = r.q.shape
    state = Softmax(jnp.full((group, 1), -jnp.inf), jnp.zeros((group, 1)), jnp.zeros((group, head_dim)))
    recent_logits, mix = _recent(r, plan, head)
    state = state.add(recent_logits, mix)
    for tier in range(plan.layout.tiers):
        state = lax.fori_loop(0, stream.chunks(head, tier), _chunk_step(r, plan, stream, head, tier), state)
    r.output[...], lse = state.normalised()
    if plan.layout.scored:
        r.recent_scores[...] = group_score(recent_logits, lse, plan.layout, keepdims=True)
        _score_pages(r, plan, stream, head, lse)
    else:
        r.recent_scores[...] = jnp.zeros(r.recent_scores.shape)


def _matmul(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Product in the type of `a`, sums in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b.astype(a.dtype), dimensions, precision=precision, preferred_element_type=jnp.float32)


def _recent(r: Refs, plan: Plan, head) -> tuple[Array, Callable[[Array], Array]]:
    """Logits `[G, N]` of the recent window and the product of weights with its values."""
    slots, length = r.recent_k.shape[0], r.recent_len[head]
    slot = lax.broadcasted_iota(jnp.int32, (1, slots), 1)
    seen = slot < length
    if plan.window is not None:
        seen &= length - 1 - slot < plan.window
    logits = soft_cap(_matmul(r.q[...], r.recent_k[...], (1, 1)) * plan.sm_scale, plan.soft_cap)
    live = lax.broadcasted_iota(jnp.int32, (slots, 1), 0) < length
    values = jnp.where(live, r.recent_v[...].astype(jnp.float32), 0.0)
    return jnp.where(seen, logits, -jnp.inf), lambda weights: _matmul(weights.astype(r.q.dtype), values, (1, 0))


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
    k_runs, v_runs = (_runs(codec.tiles(layout.head_dim)) for codec in (codecs.key, codecs.value))
    queries = [r.q[:, run.channels] for run in k_runs]
    sums = [q.astype(jnp.float32).sum(axis=1, keepdims=True) for q in queries]

    def body(chunk, state: Softmax) -> Softmax:
        buffer = stream.next(head, tier, chunk)
        if layout.scored:
            _read_scores(r, stream, head, tier, chunk)
        live = _live(r, plan, head, tier, chunk)
        blocks = [_Block(r, plan, tier, buffer, page, block) for page, block, _ in _blocks(plan, tier)]
        logits = jnp.concatenate([_block_logits(block, k_runs, queries, sums) for block in blocks], axis=1)
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
                _block_mix(b, v_runs, weights[:, t], live[:, t], r.q.dtype)
                for b, (_, _, t) in zip(blocks, _blocks(plan, tier), strict=True)
            ]
            return jnp.concatenate([sum(part[1:], start=part[0]) for part in zip(*parts, strict=True)], axis=1)

        return state.add(logits, mix)

    return body


class _Run(NamedTuple):
    """Adjacent tiles that share scale and zero point, or have none: one product takes them all."""

    tiles: tuple[Tile, ...]

    @property
    def channels(self) -> slice:
        return slice(self.tiles[0].channel, self.tiles[-1].channel + self.tiles[-1].channels)


def _runs(tiles: Iterable[Tile]) -> list[_Run]:
    runs: list[list[Tile]] = []
    for tile in tiles:
        if runs and runs[-1][0].scale_row == tile.scale_row:
            runs[-1].append(tile)
        else:
            runs.append([tile])
    return [_Run(tuple(run)) for run in runs]


class _Block:
    """A block of a chunk in VMEM. Every plane is read once."""

    def __init__(self, r: Refs, plan: Plan, tier: int, buffer, page: int, block: int):
        self._r, self._at, self._index = r, (buffer, page), block
        fmt, count, head_dim = plan.layout.formats[tier], plan.layout.blocks[tier], plan.layout.head_dim
        k_rows, v_rows = fmt.key.rows(head_dim), fmt.value.rows(head_dim)
        self.payload = (block * k_rows, count * k_rows + block * v_rows)
        self.metadata = (block * fmt.key.meta_rows, count * fmt.key.meta_rows + block * fmt.value.meta_rows)

    def codes(self, run: _Run, tensor: int) -> Array:
        """Float32 codes `[channels, T]` of K (0) or V (1)."""
        planes: dict[tuple[int, int], Array] = {}
        parts = []
        for tile in run.tiles:
            keys = [(row, tile.channels) for row in tile.rows]
            planes |= {key: self._plane(self.payload[tensor] + key[0], key[1]) for key in keys if key not in planes}
            parts.append(tile.unpack([planes[key] for key in keys]))
        return jnp.concatenate(parts, axis=0)

    def meta(self, row: int, tensor: int) -> Array:
        """Metadata row of K (0) or V (1), float32 `[1, T]`."""
        return half_to_float(self._r.meta_buffer[(*self._at, pl.ds(self.metadata[tensor] + row, 1))].astype(jnp.int32))

    def position(self) -> Array:
        """int32 `[1, T]`."""
        return self._r.position_buffer[(*self._at, pl.ds(self._index, 1))].astype(jnp.int32)

    def _plane(self, row: int, rows: int) -> Array:
        return self._r.payload_buffer[(*self._at, pl.ds(row, rows))].astype(jnp.int32)


def _block_logits(block: _Block, runs: Sequence[_Run], queries: Sequence[Array], sums: Sequence[Array]) -> Array:
    """Products `[G, T]` of the queries with the keys of a block: `scale (q . codes) + zero sum(q)`."""
    logits = []
    for run, q, q_sum in zip(runs, queries, sums, strict=True):
        product, tile = _matmul(q, block.codes(run, 0), (1, 0)), run.tiles[0]
        if tile.scale_row is not None:
            product = product * block.meta(tile.scale_row, 0)
        if tile.zero_row is not None:
            product = product + q_sum * block.meta(tile.zero_row, 0)
        logits.append(product)
    return sum(logits[1:], start=logits[0])


def _block_mix(block: _Block, runs: Sequence[_Run], weights: Array, live: Array, dtype) -> list[Array]:
    """Weights `[G, T]` times the values of a block, `[G, channels]` of each run: `(w scale) . codes + sum(w zero)`."""
    parts = []
    for run in runs:
        codes, tile = block.codes(run, 1), run.tiles[0]
        if tile.scale_row is None:
            parts.append(_matmul(weights.astype(dtype), jnp.where(live, codes, 0.0), (1, 1)))
            continue
        part = _matmul((weights * jnp.where(live, block.meta(tile.scale_row, 1), 0.0)).astype(dtype), codes, (1, 1))
        if tile.zero_row is not None:
            part = part + (weights * jnp.where(live, block.meta(tile.zero_row, 1), 0.0)).sum(axis=1, keepdims=True)
        parts.append(part)
    return parts


def _read_scores(r: Refs, stream: Stream, head, tier: int, chunk) -> None:
    """Ask for the significance of the pages of a chunk."""
    near = r.scores.at[lax.rem(head, 2)]
    first = stream.first_page(head, tier) + chunk * stream.plan.pages[tier]
    stream.each_page(
        head, tier, chunk, lambda i, page: pltpu.make_async_copy(r.significance.at[page], near.at[first + i], r.scores_read).start()
    )


def _score_pages(r: Refs, plan: Plan, stream: Stream, head, lse: Array) -> None:
    """Add the probabilities of the kept logits to the significance of the head's pages and send it back to the pool.

    The head waits for what the head before it has sent, and only the last head of a core for its own.
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
            first_block, live = _first_block(plan, stream, head, tier, chunk), _live(r, plan, head, tier, chunk)
            first_page = stream.first_page(head, tier) + chunk * plan.pages[tier]
            for i, (page, block, tokens) in enumerate(_blocks(plan, tier)):
                at = (first_page + page, pl.ds(block, 1))
                scores = group_score(r.logits[first_block + i], lse, plan.layout, keepdims=True)
                near[at] = jnp.where(live[:, tokens], near[at] + scores, near[at])
            stream.each_page(
                head,
                tier,
                chunk,
                lambda i, page: pltpu.make_async_copy(near.at[first_page + i], r.significance.at[page], r.scores_written).start(),
            )
            return 0

        lax.fori_loop(0, stream.chunks(head, tier), body, 0)

    pl.when(head > stream.end - plan.heads)(lambda: wait(head - 1, r.scores_written))
    wait(head, r.scores_read)
    for tier in range(plan.layout.tiers):
        score_chunk(tier)
    pl.when(head == stream.end - 1)(lambda: wait(head, r.scores_written))
