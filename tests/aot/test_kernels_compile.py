"""Every kernel at the shapes of Llama-3-8B, compiled for real chips: it lowers, fits, does not
spill and copies no array of the pool.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import llama8b
import pytest
from jax import ShapeDtypeStruct as Shape
from llama8b import CONTEXT, FLUSH, GROUP, HEADS, LAYERS, SLOTS, int32

from benchmarks.roofline import chips
from diffkv_jax.pallas_kernels.apply_event import Tokens, apply_event
from diffkv_jax.pallas_kernels.codecs import KVFormat, demote, encode
from diffkv_jax.pallas_kernels.decode_attention import decode_attention
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.plan_event import count_moves
from diffkv_jax.pallas_kernels.prefill_attention import Chunk, Scale, column_sums, prefill_attention
from diffkv_jax.pallas_kernels.recent_window import append_recent, shift_recent

pytestmark = pytest.mark.compile

KERNELS = {"cuda": Kernels("triton"), "tpu": Kernels("mosaic_tpu")}
MOST_SPILLED = 64  # bytes a thread
CHUNK = 1024
LEVELS = ("K4nV4n", "K2nV2n")  # of the normal distribution


class Program(NamedTuple):
    """A function to compile, its arguments' shapes, which of them it may overwrite, and the most
    temporary bytes it may take.
    """

    run: Callable
    arguments: tuple
    donate: tuple[int, ...]
    temporary: int


def attention(
    kernels: Kernels,
    formats=("K8V4", "K4V2"),
    head_dim=llama8b.HEAD_DIM,
    group=GROUP,
    over="max",
    rope=False,
) -> Program:
    layout = llama8b.layout(kernels, formats, head_dim, over, rope)
    q = Shape((HEADS, group, head_dim), jnp.bfloat16)

    def run(q, pages, heads):
        out, significance, recent = decode_attention(
            q, pages, layout, heads, max_len=CONTEXT, sm_scale=0.1, kernels=kernels
        )
        return out, dataclasses.replace(pages, significance=significance), recent

    # logits between the two passes, partial outputs
    scratch = HEADS * 4 * (CONTEXT + 4096) * max(group, 4)
    # XLA lays windows of 64 channels out the other way round
    if head_dim < 128 and kernels.implementation == "mosaic_tpu":
        scratch += 2 * LAYERS * HEADS * SLOTS * 128 * 2
    return Program(
        run, (q, llama8b.pool(layout), llama8b.heads(layout)), (1,), scratch + (32 << 20)
    )


def new_tokens(kernels: Kernels) -> Program:
    heads = llama8b.heads(llama8b.layout(kernels))
    token = Shape((HEADS, llama8b.HEAD_DIM), jnp.bfloat16)
    windows = (heads.recent_k, heads.recent_v)
    return Program(
        partial(append_recent, kernels=kernels),
        (*windows, int32(), token, token, int32(HEADS)),
        (0, 1),
        8 << 20,
    )


def shift(kernels: Kernels) -> Program:
    window = Shape((1, LAYERS * HEADS, SLOTS, llama8b.HEAD_DIM), jnp.bfloat16)
    scores = Shape(window.shape[:3], jnp.float32)
    run = partial(shift_recent, kernels=kernels)
    return Program(
        run, (window, window, scores, int32(), int32(LAYERS * HEADS)), (0, 1, 2), 8 << 20
    )


def quantise(kernels: Kernels, name="K8V4") -> Program:
    x = Shape((1024, llama8b.HEAD_DIM, kernels.tokens_per_block), jnp.bfloat16)
    return Program(partial(encode, KVFormat.parse(name), kernels=kernels), (x, x), (), 8 << 20)


def requantise(kernels: Kernels, names=("K8V4", "K4V2")) -> Program:
    high, low = map(KVFormat.parse, names)
    x = Shape((1024, llama8b.HEAD_DIM, kernels.tokens_per_block), jnp.float32)
    block = jax.eval_shape(high.encode, x, x)
    return Program(partial(demote, high, low, kernels=kernels), (block,), (), 8 << 20)


def count(kernels: Kernels) -> Program:
    layout, heads = llama8b.layout(kernels), LAYERS * HEADS
    stored = llama8b.stored(layout, heads)

    def run(pages, page_table, tier_len, rule):
        return count_moves(
            pages,
            layout,
            page_table,
            tier_len,
            rule,
            one_victim=False,
            max_len=CONTEXT,
            kernels=kernels,
        )

    return Program(
        run,
        (stored.pages, stored.page_table, stored.tier_len, llama8b.rule(layout, heads)),
        (),
        16 << 20,
    )


def event(kernels: Kernels, formats=("K8V4", "K4V2")) -> Program:
    layout, heads = llama8b.layout(kernels, formats), LAYERS * HEADS
    window = Shape((heads, SLOTS, llama8b.HEAD_DIM), jnp.bfloat16)
    tokens = Tokens(window, window, Shape((heads, SLOTS), jnp.float32), int32(heads, SLOTS))
    options = dict(one_victim=False, max_len=CONTEXT, pages_a_round=1, kernels=kernels)

    def run(stored, rule, moves, tokens, entering, admitted):
        return apply_event(stored, layout, rule, moves, tokens, entering, admitted, **options)

    arguments = (
        llama8b.stored(layout, heads),
        llama8b.rule(layout, heads),
        llama8b.moves(layout, heads),
        tokens,
    )
    return Program(run, (*arguments, int32(heads, FLUSH), Shape((heads,), bool)), (0,), 256 << 20)


def _chunk() -> Chunk:
    keys = Shape((HEADS, CHUNK, llama8b.HEAD_DIM), jnp.bfloat16)
    return Chunk(
        Shape((HEADS, GROUP, CHUNK, llama8b.HEAD_DIM), jnp.bfloat16), keys, keys, int32(HEADS)
    )


def prefill(kernels: Kernels, formats=("K8V4", "K4V2")) -> Program:
    layout = llama8b.layout(kernels, formats)

    def run(chunk, pages, heads):
        return prefill_attention(chunk, pages, layout, heads, Scale(0.1, None), kernels=kernels)

    return Program(run, (_chunk(), llama8b.pool(layout), llama8b.heads(layout)), (), 64 << 20)


def sums(kernels: Kernels, over="max") -> Program:
    layout = llama8b.layout(kernels, over=over)

    def run(chunk, lse, pages, heads):
        sums = column_sums(chunk, lse, 64, pages, layout, heads, Scale(0.1, None), kernels=kernels)
        return sums._replace(pages=dataclasses.replace(pages, significance=sums.pages))

    lse = Shape((HEADS, GROUP, CHUNK), jnp.float32)
    return Program(
        run, (_chunk(), lse, llama8b.pool(layout), llama8b.heads(layout)), (2,), 64 << 20
    )


PROGRAMS = {
    "decode attention": attention,
    "decode attention, grouped": partial(attention, formats=("K8V4:1,2", "K4V2:2,4")),
    "decode attention, d=64, G=3": partial(attention, head_dim=64, group=3),
    "decode attention, d=256, G=8": partial(attention, head_dim=256, group=8),
    "decode attention, bf16 pages": partial(attention, formats=("full",)),
    "decode attention, levels": partial(attention, formats=LEVELS),
    "decode attention, mean of G=3": partial(attention, group=3, over="mean"),
    "decode attention, codebooks": partial(attention, formats=("K8v4V8v4",), rope=True),
    "decode attention, learned levels and outliers, d=64": partial(
        attention, formats=("K4sV4t+o1",), head_dim=64, group=3, rope=True
    ),
    "decode attention, few learned levels and outliers": partial(
        attention, formats=("K3sV3t+o1", "K2sV1t"), rope=True
    ),
    "decode attention, turned integers and outliers": partial(
        attention, formats=("K8V4+o1", "K4V4"), head_dim=64, rope=True
    ),
    "append": new_tokens,
    "shift": shift,
    "encode": quantise,
    "encode, levels": partial(quantise, name="K4nV2n"),
    "demote": requantise,
    "demote, to levels": partial(requantise, names=("K8V4", "K4nV2n")),
    "count moves": count,
    "event": event,
    "event, levels": partial(event, formats=LEVELS),
    "prefill": prefill,
    "prefill, levels": partial(prefill, formats=LEVELS),
    "column sums": sums,
    "column sums, mean": partial(sums, over="mean"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_compiles(chip: chips.Chip, name: str):
    program = PROGRAMS[name](KERNELS[chip.platform])
    compiled = chips.compile_for(chip, program.run, *program.arguments, donate=program.donate)
    assert compiled.memory.temp_size_in_bytes <= program.temporary
    donated = sum(
        x.size * x.dtype.itemsize
        for i in program.donate
        for x in jax.tree.leaves(program.arguments[i])
    )
    if donated:
        assert compiled.memory.alias_size_in_bytes >= donated
    for kernel, takes in compiled.kernels.items():
        assert takes.spill_stores <= MOST_SPILLED, (
            f"{kernel} spills {takes.spill_stores} bytes a thread: {takes}"
        )
