"""Ctrl-C while compiled programs take a cache and give it back: the cache is never lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
from tqdm import tqdm

from diffkv_jax.cache.cache import KVCache


class Held:
    """A cache and what belongs to it, handed from one compiled call to the next, which take its
    memory.

    Within the context (of the main thread) Ctrl-C calls the handler that was there, which raises
    `KeyboardInterrupt` unless it is the user's own, at once while the cache is here, and after the
    call that has taken it, so that `value` can always be gone on from.

    `bar` makes progress bars: shown with `progress`, with None where standard error is a terminal.
    """

    def __init__(self, value: Any, cache: KVCache, progress: bool | None = False):
        self.value, self.cache = value, cache
        self.bar = partial(tqdm, disable=None if progress is None else not progress, leave=False)
        self._waits = self._closing = False
        self._before: Any = None

    def update(self, call: Callable[..., tuple[Any, KVCache]], *given: Any) -> None:
        """`value, cache = call(value, cache, *given)`, where the call may take (donate) both.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed meanwhile; both are those after the call.
        """
        self.value, self.cache = call(self.value, self.cache, *given)
        self._deliver()

    def close(self) -> None:
        """Let Ctrl-C do nothing any more in this context: what is left is short, and must not be
        lost to a second one.
        """
        self._closing = True

    def __enter__(self) -> "Held":
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(before):
            self._before = before
            signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        self._deliver()

    def _pressed(self, *_: Any) -> None:
        self._waits = not self._closing
        if not any(x.is_deleted() for x in jax.tree.leaves(self.cache)):
            self._deliver()

    def _deliver(self) -> None:
        if self._waits:
            self._waits = False
            self._before(signal.SIGINT, None)


@contextmanager
def held_back() -> Iterator[None]:
    """Ctrl-C waits for the end of the context (of the main thread), so that nothing it changes is
    half changed.
    """
    before, pressed = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            before(signal.SIGINT, None)
