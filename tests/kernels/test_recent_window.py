"""Appending to and shifting the recent window, every implementation against NumPy loops, bit by
bit.
"""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS

from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.recent_window import append_recent, mosaic_tpu, shift_recent

LAYERS = 2
SHAPES = (
    (11, 24, 64),
    (3, 96, 128),
    (2, 7, 16),
    (9, 40, 80),
)  # heads, slots, head_dim: no power of two, no multiple of 8


@cache
def compiled(operation, kernels: Kernels):
    """An operation under jit that donates the windows."""
    donated = (
        ("recent_k", "recent_v")
        if operation is append_recent
        else ("recent_k", "recent_v", "significance")
    )
    return jax.jit(partial(operation, kernels=kernels), donate_argnames=donated)


def windows(
    shape: tuple[int, int, int], dtype: str, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """K and V windows [LAYERS, B, N, d] with NaN in every third slot, as dead slots may hold."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(2):
        window = rng.normal(size=(LAYERS, *shape)).astype(np.float32)
        window[:, :, 2::3] = np.nan
        made.append(window.astype(jnp.dtype(dtype)))
    return made[0], made[1]


def same_bits(got, wanted: np.ndarray) -> None:
    """Equal dtype, shape and bits, NaN included."""
    got = np.asarray(got)
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    unsigned = np.dtype(f"uint{8 * wanted.dtype.itemsize}")
    np.testing.assert_array_equal(got.view(unsigned), wanted.view(unsigned))


def appended(window: np.ndarray, layer: int, token: np.ndarray, slot: np.ndarray) -> np.ndarray:
    """The oracle of `append_recent`."""
    out = window.copy()
    for head, at in enumerate(slot):
        if 0 <= at < window.shape[2]:
            out[layer, head, at] = token[head].astype(window.dtype)
    return out


def shifted(window: np.ndarray, layer: int, shift: np.ndarray) -> np.ndarray:
    """The oracle of `shift_recent`."""
    out = window.copy()
    for head, by in enumerate(shift):
        if by:
            out[layer, head] = 0
            out[layer, head, : window.shape[2] - by] = window[layer, head, by:]
    return out


def new_tokens(
    shape: tuple[int, int, int], dtype: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """k, v [B, d] in another dtype than the window's, and slots that include the first, the last
    and such as must not be written.
    """
    heads, slots, head_dim = shape
    rng = np.random.default_rng(1)
    k, v = (rng.normal(size=(heads, head_dim)).astype(np.float32) for _ in range(2))
    slot = np.fromiter(
        itertools.islice(
            itertools.cycle((slots - 1, 1, -1, 0, slots, slots // 2, -(10**6), 10**6)), heads
        ),
        np.int32,
    )
    other = jnp.bfloat16 if dtype == "float32" else np.float32
    return k.astype(other), v.astype(other), slot


def run_append(kernels: Kernels, shape: tuple[int, int, int], dtype: str, layer: int):
    """(results, expected) of one append."""
    old, (k, v, slot) = windows(shape, dtype), new_tokens(shape, dtype)
    got = compiled(append_recent, kernels)(*map(jnp.asarray, old), jnp.int32(layer), k, v, slot)
    return got, [
        appended(window, layer, token, slot) for window, token in zip(old, (k, v), strict=True)
    ]


@pytest.mark.daily(7)
@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_append_writes_one_slot_of_one_layer(
    kernels: Kernels, shape: tuple[int, int, int], dtype: str
):
    got, wanted = run_append(kernels, shape, dtype, layer=1)
    for one, other in zip(got, wanted, strict=True):
        same_bits(one, other)


@pytest.mark.parametrize(
    "kernels", [p for p in IMPLEMENTATIONS if p.values[0].implementation != "mosaic_tpu"]
)
def test_append_to_float16(kernels: Kernels):
    """float16 windows, which Mosaic does not have."""
    got, wanted = run_append(kernels, (3, 24, 64), "float16", layer=0)
    for one, other in zip(got, wanted, strict=True):
        same_bits(one, other)


def shifts(shape: tuple[int, int, int]) -> np.ndarray:
    """None, all, one and some of the slots."""
    heads, slots, _ = shape
    return np.fromiter(
        itertools.islice(itertools.cycle((1, 0, slots, slots // 2, slots - 1, 3)), heads), np.int32
    )


def run_shift(
    kernels: Kernels, shape: tuple[int, int, int], dtype: str, layer: int, *, scored: bool = True
):
    """(results, expected) of one shift."""
    old, shift = windows(shape, dtype), shifts(shape)
    scores = (
        np.random.default_rng(2)
        .normal(size=(LAYERS, *shape[:2]))
        .astype(np.float32)[:, :, : None if scored else 0]
    )
    got = compiled(shift_recent, kernels)(
        *map(jnp.asarray, old), jnp.asarray(scores), jnp.int32(layer), shift
    )
    return got, [
        *(shifted(window, layer, shift) for window in old),
        shifted(scores, layer, shift) if scored else scores,
    ]


@pytest.mark.daily(7)
@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_shift_moves_one_layer(kernels: Kernels, shape: tuple[int, int, int], dtype: str):
    got, wanted = run_shift(kernels, shape, dtype, layer=1)
    for one, other in zip(got, wanted, strict=True):
        same_bits(one, other)


@pytest.mark.daily(3)
@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_shift_without_significance(kernels: Kernels):
    got, wanted = run_shift(kernels, (11, 24, 64), "bfloat16", layer=0, scored=False)
    for one, other in zip(got, wanted, strict=True):
        same_bits(one, other)


NATIVE = [p for p in IMPLEMENTATIONS if p.id == "cpu"]


@pytest.mark.parametrize("kernels", NATIVE)
def test_native_windows_keep_their_axes(kernels: Kernels):
    """Heads on two axes, as the cache has them."""
    shape, split = (6, 24, 64), (LAYERS, 2, 3, 24)
    old, (k, v, slot), shift = (
        windows(shape, "bfloat16"),
        new_tokens(shape, "bfloat16"),
        shifts(shape),
    )
    scores = np.random.default_rng(2).normal(size=(LAYERS, *shape[:2])).astype(np.float32)
    k_window, v_window, score_window = (
        jnp.asarray(x.reshape(*split, *x.shape[3:])) for x in (*old, scores)
    )
    got = compiled(append_recent, kernels)(k_window, v_window, jnp.int32(1), k, v, slot)
    for one, window, token in zip(got, old, (k, v), strict=True):
        same_bits(np.asarray(one).reshape(window.shape), appended(window, 1, token, slot))
    k_window, v_window = (jnp.asarray(x.reshape(*split, *x.shape[3:])) for x in old)
    got = compiled(shift_recent, kernels)(k_window, v_window, score_window, jnp.int32(1), shift)
    for one, window in zip(got, (*old, scores), strict=True):
        same_bits(np.asarray(one).reshape(window.shape), shifted(window, 1, shift))


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize(
    "layer, by, message",
    [(LAYERS, 1, "layer outside"), (-1, 1, "layer outside"), (0, 25, "shift"), (0, -1, "shift")],
)
def test_native_shifts_outside_of_a_window_are_refused(
    kernels: Kernels, layer: int, by: int, message: str
):
    old, scores = windows((2, 24, 64), "float32"), np.zeros((LAYERS, 2, 24), np.float32)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=message):
        jax.block_until_ready(
            compiled(shift_recent, kernels)(
                *map(jnp.asarray, (*old, scores)), jnp.int32(layer), np.array([0, by], np.int32)
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize("interpret", [True, "checked"])
def test_several_grid_steps_on_tpu(interpret):
    """11 heads in steps of 8: the second step has heads that do not exist, and its copies overlap
    those of the first.
    """
    shape, blocks = (11, 24, 64), mosaic_tpu.Blocks(8)
    old, (k, v, slot), shift = (
        windows(shape, "bfloat16"),
        new_tokens(shape, "bfloat16"),
        shifts(shape),
    )
    call = partial(mosaic_tpu.append_recent, interpret=interpret, blocks=blocks)
    got = jax.jit(call)(*old, jnp.int32(1), k, v, slot)
    for one, window, token in zip(got, old, (k, v), strict=True):
        same_bits(one, appended(window, 1, token, slot))
    scores = np.random.default_rng(2).normal(size=(LAYERS, *shape[:2])).astype(np.float32)
    got = jax.jit(partial(mosaic_tpu.shift_recent, interpret=interpret, blocks=blocks))(
        *old, scores, jnp.int32(0), shift
    )
    for one, window in zip(got, (*old, scores), strict=True):
        same_bits(one, shifted(window, 0, shift))


def test_blocks_bound_the_memory_of_a_step():
    """Many heads go in several steps, whatever their number; few in one."""
    assert mosaic_tpu.Blocks.choose(24, 1 << 10).heads == 24
    for head_bytes in (1, 100 << 10, 1 << 30):
        heads = mosaic_tpu.Blocks.choose(10**7, head_bytes).heads
        assert heads % 8 == 0 and (heads == 8 or heads * head_bytes <= mosaic_tpu.BUFFER_BYTES)


@pytest.mark.parametrize(
    "kind",
    [
        "next slot",
        "other layer",
        "K and V swapped",
        "nothing written",
        "out of range written",
        "not cast",
    ],
)
def test_the_comparison_sees_wrong_appends(kind: str):
    """Results of an append with one thing wrong are rejected."""
    old, (k, v, slot) = windows((11, 24, 64), "bfloat16"), new_tokens((11, 24, 64), "bfloat16")
    right = appended(old[0], 1, k, slot)
    same_bits(right.copy(), right)
    wrong = {
        "next slot": appended(old[0], 1, k, slot + 1),
        "other layer": appended(old[0], 0, k, slot),
        "K and V swapped": appended(old[0], 1, v, slot),
        "nothing written": old[0],
        "out of range written": appended(old[0], 1, k, np.clip(slot, 0, 23)),
        "not cast": appended(old[0].astype(np.float32), 1, k, slot),
    }[kind]
    with pytest.raises(AssertionError):
        same_bits(wrong, right)


@pytest.mark.parametrize(
    "kind", ["rotated", "one more", "downwards", "not zeroed", "NaN of a resting head lost"]
)
def test_the_comparison_sees_wrong_shifts(kind: str):
    """Results of a shift with one thing wrong are rejected."""
    (old, _), shift = windows((11, 24, 64), "bfloat16"), shifts((11, 24, 64))
    right = shifted(old, 1, shift)
    wrong = right.copy()
    for head, by in enumerate(shift):
        if kind == "rotated":
            wrong[1, head] = np.roll(old[1, head], -by, axis=0)
        elif kind == "downwards":
            wrong[1, head] = np.roll(old[1, head], by, axis=0)
        elif kind == "one more":
            wrong[1, head, :-1] = right[1, head, 1:]
        elif kind == "not zeroed" and by:
            wrong[1, head, 24 - by :] = old[1, head, 24 - by :]
        elif kind == "NaN of a resting head lost" and not by:
            wrong[1, head] = np.nan_to_num(wrong[1, head].astype(np.float32))
    with pytest.raises(AssertionError):
        same_bits(wrong, right)
