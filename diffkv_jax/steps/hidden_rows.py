"""A token that a layer drops while a prompt chunk is read is not there for deeper layers
(`Score.hides_dropped`).

Its rows go on through the model as padding: no row that is present sees them, and their hidden
states are never used.
"""

import dataclasses

import jax.numpy as jnp
from jax import Array

from diffkv_jax.cache.cache import KVCache


def present_rows(cache: KVCache, chunk_len: int, length: Array) -> tuple[Array, Array]:
    """Which row of the chunk goes where, int32 [R, C], so that those present are at the end, in
    order, and how many those are [R].

    `length` int32 [R] are real, at the end.
    """
    present = cache.in_chunk.present
    if present is None:
        shape = (cache.spec.num_requests, chunk_len)
        return jnp.broadcast_to(jnp.arange(chunk_len), shape), length
    return jnp.argsort(present, axis=1, stable=True), present.sum(axis=1, dtype=jnp.int32)


def take_rows(cache: KVCache, x: Array, rows: Array) -> Array:
    """`x [R, C, ...]` in the order of `rows`."""
    if cache.in_chunk.present is None:
        return x
    return jnp.take_along_axis(x, rows[:, :, None, None], axis=1)


def put_back(cache: KVCache, out: Array, rows: Array) -> Array:
    """Inverse of `take_rows`."""
    return take_rows(cache, out, jnp.argsort(rows, axis=1))


def note_dropped(cache: KVCache, rows: Array, dropped: Array) -> KVCache:
    """The cache when the tokens `dropped` bool [R, C], in the order of `rows`, are no longer
    present.
    """
    present = cache.in_chunk.present
    if present is None:
        return cache
    here = present & ~jnp.take_along_axis(dropped, jnp.argsort(rows, axis=1), axis=1)
    return dataclasses.replace(cache, in_chunk=cache.in_chunk._replace(present=here))
