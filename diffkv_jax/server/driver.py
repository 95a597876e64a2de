"""A thread that steps an engine, and what its requests tell to consumers on an event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from diffkv_jax.serving import Engine, Event, Request

GRACE = 10.0  # seconds that a step may take to end once all has been cancelled


class EngineFailed(RuntimeError):
    """A step of the engine has raised; it is not stepped again."""


class Closed(RuntimeError):
    """The driver takes no requests any more."""


class Full(RuntimeError):
    """More requests are open than may be."""


class _Mail:
    """Events of one request that nobody has taken yet; the last may be an error."""

    def __init__(self) -> None:
        self.items: deque[Event | Exception] = deque()
        self.bell: Callable[[], None] | None = None

    def put(self, item: Event | Exception) -> None:
        self.items.append(item)
        if self.bell is not None:
            self.bell()


class Driver:
    """Steps `engine` in a daemon thread while it is busy. Nobody else may step it; requests that
    are submitted past the driver wait until it is woken.

    Args:
        most_open: most requests that have not finished; None: any number.
        watch: called in the thread with the events of each step, between two steps.

    Attributes:
        failed: what a step has raised.
        closing: whether `close` was called.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        most_open: int | None = None,
        watch: Callable[[Sequence[Event]], None] | None = None,
    ):
        self.engine, self.most_open = engine, most_open
        self.failed: BaseException | None = None
        self.closing = self._stopped = False
        self._watch = watch
        self._mail: dict[Request, _Mail] = {}  # until its consumer has left
        self._open: set[Request] = set()  # until it has finished
        # Events are handed out only while nobody is between `Engine.submit` and its mailbox. The
        # event loop never takes this lock: a submission computes.
        self._submitting = threading.Lock()
        self._changed = threading.Condition(threading.Lock())  # of the two above
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="diffkv-engine", daemon=True)
        self._thread.start()

    # --- any thread

    @property
    def num_open(self) -> int:
        """Requests that have not finished."""
        return len(self._open)

    def submit(self, prompt: Any, **options: Any) -> Request:
        """`Engine.submit`, from any thread.

        Raises:
            TypeError, ValueError: those of `Engine.submit`.
            Full, Closed, EngineFailed: it cannot be taken.
        """
        found: list[Request] = []
        self.submit_all([{"prompt": prompt, **options}], found)
        return found[0]

    def submit_all(self, asked: Sequence[Mapping[str, Any]], found: list[Request]) -> None:
        """Submit all, or none of them: keywords of `Engine.submit` each. The requests are appended
        to `found`, which the caller has even where the wait for this call is given up.

        Raises:
            as `submit`.
        """
        with self._submitting:
            self._check(len(asked))
            try:
                for options in asked:
                    found.append(self.engine.submit(**options))
                with self._changed:
                    self._check(0)  # it may have closed meanwhile
                    for request in found:
                        self._mail[request] = _Mail()
                        self._open.add(request)
            except BaseException:
                for request in found:
                    request.cancel()
                found.clear()
                raise
            finally:
                self._wake.set()

    def _check(self, more: int) -> None:
        if self.failed is not None:
            raise EngineFailed(f"the engine has failed: {self.failed!r}")
        if self.closing:
            raise Closed("the server is shutting down")
        if self.most_open is not None and len(self._open) + more > self.most_open:
            raise Full(f"{len(self._open)} requests are open, at most {self.most_open} may be")

    def drop(self, requests: Iterable[Request]) -> None:
        """Nobody waits for these any more: the ones that run are cancelled, their pages free at the
        next step.
        """
        with self._changed:
            for request in requests:
                self._mail.pop(request, None)
                if request in self._open:
                    request.cancel()

    def close(self, drain_seconds: float = 30.0) -> None:
        """Take no more requests, wait so long for those that run, then cancel them. Takes at most
        `2 * GRACE` seconds more.
        """
        with self._changed:
            self.closing = True
            self._changed.wait_for(lambda: not self._open, max(drain_seconds, 0))
            for request in self._open:
                request.cancel()
            self._changed.wait_for(lambda: not self._open, GRACE)
            self._stopped = True
            self._end_all(lambda: Closed("the server is shutting down"))
        self._wake.set()
        self._thread.join(GRACE)

    # --- the event loop

    async def stream(
        self, *requests: Request, seconds: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Events of all of them until each has finished. To leave earlier is to cancel them; a loop
        that may be left by `break` belongs into `contextlib.aclosing`.

        Raises:
            TimeoutError: they took longer than `seconds`.
            EngineFailed, Closed: a step raised, or the driver was closed.
        """
        try:
            ready, loop = asyncio.Event(), asyncio.get_running_loop()
            with self._changed:
                mails = [self._mail[request] for request in requests]
            for mail in mails:
                mail.bell = lambda: _ring(loop, ready)
            end = None if seconds is None else monotonic() + seconds
            left = len(requests)
            while True:
                ready.clear()
                for mail in mails:
                    while mail.items:
                        item = mail.items.popleft()
                        if isinstance(item, Exception):
                            raise item
                        left -= item.finish_reason is not None
                        yield item
                if not left:
                    return
                await asyncio.wait_for(ready.wait(), None if end is None else end - monotonic())
        finally:
            self.drop(requests)

    # --- the thread

    def _run(self) -> None:
        while not self._stopped:
            self._wake.wait()
            self._wake.clear()
            try:
                while self.engine.busy and not self._stopped:
                    self._hand_out(self.engine.step())
            except BaseException as error:
                self._fail(error)
                return

    def _hand_out(self, events: Sequence[Event]) -> None:
        with self._submitting, self._changed:
            for event in events:
                if event.request in self._mail:
                    self._mail[event.request].put(event)
                if event.finish_reason is not None:
                    self._open.discard(event.request)
            self._changed.notify_all()
        if self._watch is not None:
            self._watch(events)

    def _fail(self, error: BaseException) -> None:
        with self._submitting, self._changed:
            self.failed = error
            self._end_all(lambda: EngineFailed(f"the engine has failed: {error!r}"))

    def _end_all(self, error: Callable[[], Exception]) -> None:
        """Tell an error to all that wait for a request that has not finished."""
        for request in self._open:
            if request in self._mail:
                self._mail[request].put(error())
        self._open.clear()
        self._changed.notify_all()


def _ring(loop: asyncio.AbstractEventLoop, ready: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody listens
        loop.call_soon_threadsafe(ready.set)
