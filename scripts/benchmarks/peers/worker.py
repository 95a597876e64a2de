"""A process for each system of `benchmarks peers`, kept alive and driven over a pipe, so that
competitors take turns in one run.

The parent starts `python -m benchmarks.peers.worker NAME ...` and sends pickled (method,
arguments); the worker answers with a `Reply`. A process has its own thread pools and its own
peak of resident memory. Everything that a library prints goes to a log file.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class Reply:
    """An answer: the value, the largest resident memory of the process during the call, and None or
    one line why there is no value.
    """

    value: Any
    peak_bytes: int
    error: str | None = None


class WorkerError(RuntimeError):
    """A system cannot do what was asked; the message is the reason."""


class Worker:
    """The parent's end."""

    def __init__(self, name: str, gguf: Path, work: Path, threads: int):
        self.name = name
        self._log_path = work / f"{name}.log"
        command = [
            sys.executable,
            "-m",
            "benchmarks.peers.worker",
            name,
            str(gguf),
            str(work),
            str(threads),
        ]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        environment["JAX_COMPILATION_CACHE_DIR"] = str(work / "jax")
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
            )
        try:
            self.loaded = self._answer()
        except WorkerError:
            self.close()
            raise

    def call(self, method: str, *arguments: Any) -> Reply:
        """Run a method of the system.

        Raises:
            WorkerError: it failed, or the process has ended.
        """
        try:
            pickle.dump((method, arguments), self._stream("stdin"))
            self._stream("stdin").flush()
        except (BrokenPipeError, ValueError):
            raise WorkerError(self._ended()) from None
        return self._answer()

    def close(self) -> None:
        """End the process: it stops when its input ends."""
        # what could not be sent to a process that has ended
        with contextlib.suppress(BrokenPipeError):
            self._stream("stdin").close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stream("stdout").close()

    def _stream(self, name: str) -> Any:
        return getattr(self._process, name)

    def _answer(self) -> Reply:
        try:
            reply: Reply = pickle.load(self._stream("stdout"))
        except EOFError:
            raise WorkerError(self._ended()) from None
        if reply.error is not None:
            raise WorkerError(reply.error)
        return reply

    def _ended(self) -> str:
        return f"its process ended with status {self._process.wait()}; see {self._log_path}"


def serve(
    name: str, gguf: str, work: str, threads: int, requests: BinaryIO, replies: BinaryIO
) -> None:
    """The worker's end: build the system, then answer until the parent closes the pipe."""
    from benchmarks.peers.systems import SYSTEMS, Place, build

    if hasattr(os, "sched_setaffinity"):  # XLA has no other way to be told how many threads to use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    built = answered(build, SYSTEMS[name], Place(Path(gguf), Path(work), threads))
    reply = replace(built, value=None)
    while True:
        pickle.dump(reply, replies)
        replies.flush()
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        reply = answered(getattr(built.value, method, None) or _no_method(name, method), *arguments)


def _no_method(name: str, method: str) -> Callable:
    def refuse(*_: Any) -> None:
        raise NotImplementedError(f"{name} has no {method}")

    return refuse


def answered(function: Callable, *arguments: Any) -> Reply:
    """Call it; an error is an answer too."""
    reset_peak()
    try:
        value = function(*arguments)
    except BaseException as error:  # a peer that fails is reported, whatever it raises
        traceback.print_exc()
        return Reply(None, peak_bytes(), f"{type(error).__name__}: {first_line(error)}")
    return Reply(value, peak_bytes())


def first_line(error: BaseException, width: int = 200) -> str:
    """The beginning of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")[:width]


def reset_peak() -> None:
    """Start a new peak of resident memory, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak is then that of the whole life of the process


def peak_bytes() -> int:
    """Largest resident memory since `reset_peak`, else since the process began."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def main() -> None:
    """Keep the pipe to ourselves and send everything else that is printed to the log."""
    name, gguf, work, threads = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(name, gguf, work, int(threads), sys.stdin.buffer, replies)


if __name__ == "__main__":
    # The classes that travel must have one name on both ends: not __main__.Reply.
    from benchmarks.peers import worker

    worker.main()
