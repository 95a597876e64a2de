"""What a process does once, however many threads ask for it first."""

import functools
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

R = TypeVar("R")


class once(Generic[R]):
    """`functools.cache` for which threads wait: it alone lets all that ask before the first answer
    run the function.

    What raises is tried again.
    """

    def __init__(self, function: Callable[..., R]) -> None:
        self._cached, self._running = functools.cache(function), threading.RLock()
        functools.update_wrapper(self, function)

    def __call__(self, *args: Hashable) -> R:
        with self._running:
            return self._cached(*args)

    def cache_clear(self) -> None:
        """Forget the answers."""
        with self._running:
            self._cached.cache_clear()
