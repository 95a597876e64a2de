"""Time of every operation of the cache, Triton against plain XLA, on the shapes of one model."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.common.report import Row, Section
from benchmarks.common.states import (
    COMPRESSED,
    Setting,
    layer_heads,
    layer_tables,
    pages_of,
    random_pages,
)
from benchmarks.common.timing import Effort, Looped, Runner
from benchmarks.kernels.attention import attention_runner
from benchmarks.kernels.compare import Sizes, compare
from benchmarks.kernels.event import DECODE_EVENT, PROMPT_EVENT, time_count, time_event
from diffkv_jax.pallas_kernels.codecs import KVFormat, demote, encode
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.prefill_attention import Chunk, Scale, column_sums, prefill_attention
from diffkv_jax.pallas_kernels.recent_window import append_recent, shift_recent
from diffkv_jax.steps.store_chunk import PAGES_A_ROUND

COLUMNS = {
    "operation": "",
    "heads": "d",
    "triton us": ".1f",
    "spread": ".1%",
    "xla us": ".1f",
    "xla spread": ".1%",
    "speed-up": ".1f",
    "rate": ".1f",
    "unit": "",
    "error": ".0e",
}


def section(seconds: float) -> Section:
    """The table of the operations."""
    notes = [
        "rate: bytes that must move, or multiplications and additions, a second of the Triton "
        "kernel.",
        "XLA multiplies float32 with its default precision (tf32 on recent GPUs); the Triton "
        "kernels multiply bfloat16. "
        "error: ||Triton - XLA|| / ||XLA|| at this size.",
        "Events start from the same cache each time. decode: 32 tokens of each head enter, 2 % of "
        "the high tier fall; after a prompt: "
        "39 % of the tokens are dropped, 48 % fall.",
    ]
    return Section("Operations of the cache, Triton against XLA", COLUMNS, seconds, notes=notes)


def measure(table: Section, setting: Setting, sizes: Sizes, effort: Effort) -> None:
    """One row an operation."""
    heads = sizes.batch * setting.kv_heads
    prompt_heads, event_heads = sizes.prompts * setting.kv_heads, sizes.event_layers * heads
    operations: dict[str, tuple[int, Callable[[], Row]]] = {
        f"decode attention, {sizes.context} tokens, all high": (
            heads,
            lambda: time_attention(setting, sizes, effort),
        ),
        "append_recent": (heads, lambda: time_append(setting, sizes, effort)),
        f"shift_recent by {sizes.flush}": (heads, lambda: time_shift(setting, sizes, effort)),
        f"prefill chunk of {sizes.chunk} over {sizes.context}": (
            prompt_heads,
            lambda: time_prefill(setting, sizes, effort),
        ),
        f"column sums of {sizes.observe} rows, the same": (
            prompt_heads,
            lambda: time_column_sums(setting, sizes, effort),
        ),
        "count_moves": (event_heads, lambda: time_count(setting, sizes, effort)),
        "apply_event, decode": (
            event_heads,
            lambda: time_event(setting, sizes, effort, DECODE_EVENT, sizes.flush, 1),
        ),
        "apply_event, after a prompt": (
            event_heads,
            lambda: time_event(setting, sizes, effort, PROMPT_EVENT, sizes.chunk, PAGES_A_ROUND),
        ),
        f"encode K8V4, {sizes.blocks} blocks": (0, lambda: time_encode(setting, sizes, effort)),
        f"demote K8V4 to K4V2, {sizes.blocks} blocks": (
            0,
            lambda: time_demote(setting, sizes, effort),
        ),
    }
    for name, (count, function) in operations.items():
        table.measure({"operation": name, "heads": count or None}, function)


def time_attention(setting: Setting, sizes: Sizes, effort: Effort) -> Row:
    """One layer of decode attention, every token in the high tier."""
    heads, max_len = sizes.batch * setting.kv_heads, sizes.context + 2 * setting.slots
    layout, lengths = setting.layout(COMPRESSED, max_len), (sizes.context, 0)
    moved = heads * sizes.context * (layout.formats[0].token_bytes(setting.head_dim) + 8)
    once = dataclasses.replace(effort, repeats=1)

    def runner(kernels: Kernels) -> Runner:
        return attention_runner(setting, kernels, layout, [lengths], heads, 1, max_len, once)[0]

    return compare(setting, runner, effort, moved, "GB/s", lambda state: state[1][0][0])


def _windows(setting: Setting, layers: int, heads: int) -> tuple[Array, Array, Array]:
    k, v = (setting.queries(layers, heads, setting.slots, seed=seed) for seed in (1, 2))
    return k, v, jnp.ones((layers, heads, setting.slots), jnp.float32)


def time_append(setting: Setting, sizes: Sizes, effort: Effort) -> Row:
    """The append of one layer; the loop goes round the layers."""
    heads, layers = sizes.batch * setting.kv_heads, setting.most_layers
    token = [setting.queries(heads, seed=seed) for seed in (3, 4)]
    slot = jnp.full(heads, setting.recent, jnp.int32)

    def runner(kernels: Kernels) -> Runner:
        def step(windows, k, v, slot):
            for layer in range(layers):
                windows = append_recent(
                    windows[0], windows[1], jnp.int32(layer), k, v, slot, kernels=kernels
                )
            return windows

        return Looped(step, effort.repeats, layers).on(
            _windows(setting, layers, heads)[:2], *token, slot
        )

    return compare(setting, runner, effort, 4 * token[0].nbytes, "GB/s", lambda state: state[0])


def time_shift(setting: Setting, sizes: Sizes, effort: Effort) -> Row:
    """The shift of one layer's windows."""
    heads, layers = sizes.batch * setting.kv_heads, setting.most_layers
    shift = jnp.full(heads, sizes.flush, jnp.int32)

    def runner(kernels: Kernels) -> Runner:
        def step(windows, shift):
            for layer in range(layers):
                windows = shift_recent(
                    windows[0], windows[1], windows[2], jnp.int32(layer), shift, kernels=kernels
                )
            return windows

        return Looped(step, effort.repeats, layers).on(_windows(setting, layers, heads), shift)

    return compare(
        setting,
        runner,
        effort,
        2 * sum(x.nbytes for x in _windows(setting, layers, heads)) / layers,
        "GB/s",
    )


def _prompt(setting: Setting, sizes: Sizes):
    """Chunk, pages, layout, heads and scale of a prompt chunk over a stored context, every token in
    the high tier.
    """
    heads, max_len = (
        sizes.prompts * setting.kv_heads,
        sizes.context + sizes.chunk + 2 * setting.slots,
    )
    layout, lengths = setting.layout(COMPRESSED, max_len), (sizes.context, 0)
    num_pages = heads * pages_of(layout, lengths)
    tables, _ = layer_tables(layout, lengths, heads, 1, num_pages, max_len)
    q = setting.queries(heads, setting.group, sizes.chunk)
    k, v = (setting.queries(heads, sizes.chunk, seed=seed) for seed in (3, 4))
    chunk = Chunk(q, k, v, jnp.full(heads, sizes.chunk, jnp.int32))
    (each,) = layer_heads(setting, layout, tables, lengths)
    return (
        chunk,
        random_pages(layout, num_pages, max_len),
        layout,
        each,
        Scale(setting.head_dim**-0.5, None),
    )


def time_prefill(setting: Setting, sizes: Sizes, effort: Effort) -> Row:
    """Attention of a chunk; rate counts the products of the stored, recent and (causal) own
    keys.
    """
    chunk, pages, layout, heads, scale = _prompt(setting, sizes)
    out = (jnp.zeros(chunk.q.shape, jnp.float32), jnp.zeros(chunk.q.shape[:3], jnp.float32))

    def runner(kernels: Kernels) -> Runner:
        def step(state, chunk, pages, heads):
            del state
            return prefill_attention(chunk, pages, layout, heads, scale, kernels=kernels)

        return Looped(step).on(jax.tree.map(jnp.copy, out), chunk, pages, heads)

    keys = sizes.context + setting.recent + sizes.chunk / 2
    return compare(
        setting, runner, effort, 4 * chunk.q.size * keys, "GFLOP/s", lambda state: state[0]
    )


def time_column_sums(setting: Setting, sizes: Sizes, effort: Effort) -> Row:
    """The column sums of the last rows of the same chunk."""
    chunk, pages, layout, heads, scale = _prompt(setting, sizes)
    lse = jnp.full(chunk.q.shape[:3], float(np.log(sizes.context)), jnp.float32)
    rest = dataclasses.replace(
        pages, significance=jnp.zeros((1, *pages.significance.shape[1:]), jnp.float32)
    )
    sums = (
        jnp.zeros((chunk.k.shape[0], setting.slots), jnp.float32),
        jnp.zeros(chunk.k.shape[:2], jnp.float32),
    )

    def runner(kernels: Kernels) -> Runner:
        def step(state, chunk, lse, pages, heads):
            pool = dataclasses.replace(pages, significance=state[0])
            got = column_sums(
                chunk, lse, sizes.observe, pool, layout, heads, scale, kernels=kernels
            )
            return got.pages, (got.recent, got.chunk)

        return Looped(step).on(
            jax.tree.map(jnp.copy, (pages.significance, sums)), chunk, lse, rest, heads
        )

    keys = sizes.context + setting.recent + sizes.chunk
    rows = sizes.observe / sizes.chunk
    return compare(
        setting,
        runner,
        effort,
        2 * chunk.q.size * rows * keys,
        "GFLOP/s",
        lambda state: state[1][1],
    )


def time_encode(setting: Setting, sizes: Sizes, effort: Effort) -> Row:
    """Quantisation of blocks of exact tokens."""
    fmt = KVFormat.parse(COMPRESSED[0])
    k, v = _blocks(setting, sizes)
    moved = k.nbytes + v.nbytes + sizes.blocks * k.shape[2] * fmt.token_bytes(setting.head_dim)
    return compare(
        setting,
        lambda kernels: _maker(lambda k, v: encode(fmt, k, v, kernels=kernels), k, v),
        effort,
        moved,
        "GB/s",
        _payload,
    )


def time_demote(setting: Setting, sizes: Sizes, effort: Effort) -> Row:
    """Requantisation of blocks."""
    high, low = (KVFormat.parse(name) for name in COMPRESSED)
    block = jax.jit(high.encode)(*_blocks(setting, sizes))
    moved = (
        sizes.blocks
        * setting.kernels.tokens_per_block
        * (high.token_bytes(setting.head_dim) + low.token_bytes(setting.head_dim))
    )

    def runner(kernels: Kernels) -> Runner:
        return _maker(lambda block: demote(high, low, block, kernels=kernels), block)

    return compare(setting, runner, effort, moved, "GB/s", _payload)


def _payload(block) -> Array:
    return block.k_payload


def _blocks(setting: Setting, sizes: Sizes) -> tuple[Array, Array]:
    k, v = (
        jnp.swapaxes(
            setting.queries(sizes.blocks, setting.kernels.tokens_per_block, seed=seed), 1, 2
        )
        for seed in (1, 2)
    )
    return k, v


def _maker(function: Callable, *operands) -> Runner:
    """A function without state, as a step that overwrites what the last one made."""
    state = jax.jit(function)(*operands)
    return Looped(lambda state, *operands: function(*operands)).on(state, *operands)
