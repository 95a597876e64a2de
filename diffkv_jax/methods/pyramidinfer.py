"""A token that a layer drops while a prompt chunk is read is not there for deeper layers
(PyramidInfer, arXiv:2405.12532).

Its rows go on through the model as padding: no row that is present sees them, and their hidden
states are never used.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import KVCache


def begin_chunk(cache: KVCache, real: Array) -> KVCache:
    """All `real` bool [R, C] tokens of a chunk are present in the first layer."""
    return dataclasses.replace(cache, present=real) if cache.spec.selection.nested else cache


def end_chunk(cache: KVCache) -> KVCache:
    """Nothing is remembered between chunks."""
    return dataclasses.replace(cache, present=cache.present[:, :0])


def present_rows(cache: KVCache, chunk_len: int, length: Array) -> tuple[Array, Array]:
    """Which row of the chunk goes where, int32 [R, C], so that those present are at the end, in
    order, and how many those are [R].

    `length` int32 [R] are real, at the end.
    """
    if not cache.spec.selection.nested:
        return jnp.broadcast_to(jnp.arange(chunk_len), (cache.spec.num_requests, chunk_len)), length
    return jnp.argsort(cache.present, axis=1, stable=True), cache.present.sum(
        axis=1, dtype=jnp.int32
    )


def take_rows(cache: KVCache, x: Array, rows: Array) -> Array:
    """`x [R, C, ...]` in the order of `rows`."""
    return (
        jnp.take_along_axis(x, rows[:, :, None, None], axis=1) if cache.spec.selection.nested else x
    )


def put_back(cache: KVCache, out: Array, rows: Array) -> Array:
    """Inverse of `take_rows`."""
    return take_rows(cache, out, jnp.argsort(rows, axis=1))


def note_dropped(cache: KVCache, rows: Array, dropped: Array) -> KVCache:
    """The cache when the tokens `dropped` bool [R, C], in the order of `rows`, are no longer
    present.
    """
    if not cache.spec.selection.nested:
        return cache
    return dataclasses.replace(
        cache,
        present=cache.present & ~jnp.take_along_axis(dropped, jnp.argsort(rows, axis=1), axis=1),
    )
