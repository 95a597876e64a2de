"""What a process does once, however many threads ask for it first."""

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

R = TypeVar("R")


def once(function: Callable[..., R]) -> Callable[..., R]:
    """`functools.cache` for which threads wait: it alone lets all that ask before the first answer run the function.

    `cache_clear` forgets the answers. What raises is tried again.
    """
    cached, running = functools.cache(function), threading.RLock()

    @functools.wraps(function)
    def one_at_a_time(*args) -> R:
        with running:
            return cached(*args)

    one_at_a_time.cache_clear = cached.cache_clear  # pyright: ignore[reportAttributeAccessIssue]
    return one_at_a_time
