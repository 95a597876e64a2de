"""Memory of the compiled steps, from the compiler's own account of programs that are never run."""

import dataclasses
import re
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax import (
    CacheSpec,
    CompressionPolicy,
    Replay,
    coupled_quantization,
    diffkv,
    expected_attention,
    fastgen,
    h2o,
    kvzip,
    load_policy,
    minicache,
    pyramidinfer,
    snapkv,
)
from diffkv_jax.cache.cache import KVCache, empty_cache
from diffkv_jax.cache.pool_size import bound, tree_bytes
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.steps.jitted import decode_step, end_passes, prefill_chunk, score_pass
from diffkv_jax.testing.tiny import tiny_model

pytestmark = pytest.mark.optimized
MIB = 2**20
KERNELS = [XLA] if why_unavailable() else [XLA, Kernels("cpu")]
POLICIES = {
    "diffkv": diffkv(1.0, 0.02),
    "flush 1": diffkv(1.0, 0.02, flush=1),
    "none": CompressionPolicy.none(),
    "h2o": h2o(0.5),
    "snapkv": snapkv(0.5),
    "expected": expected_attention(0.5),
    "minicache": minicache(),
    "diffkv_minicache": load_policy("diffkv_minicache"),
    "fastgen": fastgen(protect=(1,), punctuation=(5, 6)),
    "pyramidinfer": pyramidinfer(0.5),
    "coupled": coupled_quantization(),
}
SLOW = [
    ("none", "prefill"),
    ("h2o", "decode"),
    ("snapkv", "prefill"),
    ("expected", "prefill"),
    ("pyramidinfer", "prefill"),
]
SLOW += [("coupled", "decode"), ("flush 1", "decode"), ("fastgen", "decode")]
SLOW += [(name, step) for name in ("diffkv", "diffkv_minicache") for step in ("decode", "prefill")]
LONG = [
    ("flush 1", "prefill"),
    ("fastgen", "prefill"),
    *((name, step) for name in ("windows", "minicache") for step in ("decode", "prefill")),
]
STEPS = [("none", "decode"), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
STEPS += [pytest.param(*case, marks=(pytest.mark.slow, pytest.mark.long)) for case in LONG]


def array(shape, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def cache_shapes(
    model,
    policy,
    requests: int,
    max_len: int,
    num_pages: int | None = None,
    pool: int = 0,
    kernels: Kernels = XLA,
) -> KVCache:
    """A cache of shapes only, with `num_pages` pages or as many as fit `pool` bytes."""
    spec = CacheSpec.build(
        model.attention,
        policy,
        num_requests=requests,
        max_len=max_len,
        num_pages=0,
        dtype="float32",
        kernels=kernels,
    )
    spec = dataclasses.replace(
        spec, num_pages=pool // spec.layout.page_bytes if num_pages is None else num_pages
    )
    return jax.eval_shape(
        partial(empty_cache, spec),
        bound(spec, policy),
    )


def lower_decode(model, params, cache: KVCache):
    rows = cache.spec.num_requests
    step = jax.jit(partial(decode_step, model), donate_argnums=1)
    return step.lower(params, cache, array((rows,), jnp.int32), array((rows,), bool))


def lower_prefill(model, params, cache: KVCache, chunk: int):
    rows = cache.spec.num_requests
    return prefill_chunk.lower(
        model,
        params,
        cache,
        array((rows, chunk), jnp.int32),
        array((rows,), jnp.int32),
        array((), bool),
    )


def copies_of_pool(text: str, num_pages: int) -> list[str]:
    """Instructions that copy an array of the pool (the only ones with `num_pages` rows), empty ones
    left out.
    """
    return [
        line.strip()[:160]
        for line in text.splitlines()
        if re.search(rf"= \S*\[{num_pages},(?!0,)\S* copy\(", line)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.implementation)
@pytest.mark.parametrize(("name", "step"), STEPS)
def test_pool_is_updated_in_place(name, step, kernels):
    """Donation is honoured: the pool of 256 MiB is an alias of the input, never copied, and little
    else is needed.

    A prompt chunk needs room for its own 256 tokens, which no pool makes larger (see the test of
    its peak).
    """
    if "minicache" in name and kernels != XLA:
        pytest.skip("plain XLA runs it")
    # every second layer has a sliding window
    windows = (32, None, 32, None) if name == "windows" else None
    model, params = tiny_model(layers=4, q_heads=6, kv_heads=2, windows=windows)
    cache = cache_shapes(
        model,
        POLICIES.get(name, POLICIES["diffkv"]),
        requests=2,
        max_len=4000,
        pool=256 * MIB,
        kernels=kernels,
    )
    pool = tree_bytes(cache.stored.pages)
    assert 250 * MIB < pool <= 256 * MIB
    lowered = (
        lower_decode(model, params, cache)
        if step == "decode"
        else lower_prefill(model, params, cache, 256)
    )
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < (0.05 if step == "decode" else 0.125) * pool, (
        f"{memory.temp_size_in_bytes / MIB:.1f} MiB"
    )
    text = compiled.as_text() or ""
    assert f"u8[{cache.stored.pages.num_pages}," in text, (
        "the search must be able to find the payload"
    )
    assert not copies_of_pool(text, cache.stored.pages.num_pages)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.implementation)
@pytest.mark.parametrize("name", ["replay", "event"])
def test_replay_updates_the_pool_in_place(name, kernels):
    """The pool of 256 MiB is an alias of the input, never copied."""
    model, params = tiny_model(layers=4, q_heads=6, kv_heads=2)
    cache = cache_shapes(
        model,
        kvzip(0.5, replay=Replay(chunk=256)),
        requests=2,
        max_len=4000,
        pool=256 * MIB,
        kernels=kernels,
    )
    pool = tree_bytes(cache.stored.pages)
    if name == "event":
        lowered = end_passes.lower(cache, array((2,), bool))
    else:
        lowered = score_pass.lower(
            model,
            params,
            cache,
            array((2, 256), jnp.int32),
            array((2,), jnp.int32),
            array((), jnp.int32),
        )
    compiled = lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory.alias_size_in_bytes >= pool and memory.temp_size_in_bytes < 0.1 * pool
    assert f"u8[{cache.stored.pages.num_pages}," in text and not copies_of_pool(
        text, cache.stored.pages.num_pages
    )


def test_the_account_sees_a_copied_pool():
    """The same figures of a program that does copy: no donation, and a pool that is read after it
    was written.
    """
    pool = array((4096, 96, 32), jnp.uint8)

    def step(pool, row):
        return pool.at[row].add(1), pool[row + 1].sum()

    memory = jax.jit(step).lower(pool, array((), jnp.int32)).compile().memory_analysis()
    assert memory.alias_size_in_bytes == 0 and memory.output_size_in_bytes >= 4096 * 96 * 32
    text = (
        jax.jit(lambda pool, row: (pool.at[row].add(1), pool))
        .lower(pool, array((), jnp.int32))
        .compile()
        .as_text()
    )
    assert copies_of_pool(text, 4096)


@lru_cache
def prefill_temp(max_len: int, chunk: int, layers: int = 8) -> int:
    """Bytes that one prompt chunk needs besides cache and parameters; pages for all `max_len`
    tokens.
    """
    model, params = tiny_model(layers=layers, q_heads=6, kv_heads=2, max_len=16384)
    spec = cache_shapes(model, POLICIES["diffkv"], requests=1, max_len=max_len, num_pages=0).spec
    pages = layers * 2 * spec.layout.pages_for(0, max_len)
    cache = cache_shapes(model, POLICIES["diffkv"], requests=1, max_len=max_len, num_pages=pages)
    return lower_prefill(model, params, cache, chunk).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_peak_of_prefill_grows_with_the_chunk_not_with_the_prompt():
    long, half = prefill_temp(16384, 256), prefill_temp(8192, 256)
    dense = 8 * 2 * 16384 * 2 * 64 * 4  # layers, K and V, tokens, heads, channels, float32
    assert long < 0.2 * dense, f"{long / MIB:.1f} MiB of {dense / MIB:.1f} MiB"
    assert abs(long - half) < 0.2 * half, f"{long / MIB:.1f} and {half / MIB:.1f} MiB"
    assert prefill_temp(8192, 64) < 0.7 * half


@pytest.mark.slow
def test_program_does_not_grow_with_depth():
    sizes = []
    for layers in (2, 8):
        model, params = tiny_model(layers=layers, q_heads=6, kv_heads=2)
        cache = cache_shapes(model, POLICIES["diffkv"], requests=1, max_len=1024, num_pages=500)
        sizes.append(
            [
                len(lower.as_text())
                for lower in (
                    lower_decode(model, params, cache),
                    lower_prefill(model, params, cache, 64),
                )
            ]
        )
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=0.01)
