"""One call at a time has a cache: calls take its memory."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from diffkv_jax.cache.cache import KVCache

_lock = threading.Lock()
_claimed: set[int] = set()  # ids of arrays of the caches that calls have now


@contextmanager
def claimed(cache: KVCache) -> Iterator[None]:
    """Keep other threads' calls from `cache` while the context lasts.

    Raises:
        ValueError: another call has it now, or has had it before.
    """
    mark = cache.counters.seq_len  # held here, so that its id is nobody else's
    with _lock:
        if id(mark) in _claimed:
            raise ValueError(
                "cache= is in use by a call in another thread, which takes its memory: wait for "
                "that call and go on from the "
                "cache that it returns, or give each thread a cache of its own"
            )
        if any(x.is_deleted() for x in jax.tree.leaves(cache)):
            raise ValueError(
                "this cache was given to an earlier call, which took its memory; use "
                "the cache that call returned"
            )
        _claimed.add(id(mark))
    try:
        yield
    finally:
        with _lock:
            _claimed.discard(id(mark))
