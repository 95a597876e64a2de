"""`Kept`: what takes long to learn of a model, made once, kept in this process and on disk."""

import hashlib
import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from diffkv_jax.model import CausalLM

HELD = 16  # in this process

_log = logging.getLogger("diffkv_jax")


class Saved(Protocol):
    """What writes itself into a new folder."""

    def save(self, path: Path, /) -> None: ...


class OfModel(Saved, Protocol):
    """And refuses another model than its own (ValueError)."""

    def check(self, model: CausalLM, params: Mapping[str, Any]) -> None: ...


T = TypeVar("T", bound=Saved)
M = TypeVar("M", bound=OfModel)


def kept_name(fingerprint: str, what: str) -> str:
    """What a file or folder is called that keeps `what` of the model with this fingerprint."""
    return f"{fingerprint[:16]}-{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def read_for(
    model: CausalLM, params: Mapping[str, Any], load: Callable[[Path], M]
) -> Callable[[Path], M]:
    """`load`, and a refusal of what was made with another model."""

    def read(folder: Path) -> M:
        found = load(folder)
        found.check(model, params)
        return found

    return read


class Kept(Generic[T]):
    """Each by the folder that keeps it. Threads that ask for the same one wait for the first;
    processes may both make it, and a folder is there whole or not at all.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[Path, T] = OrderedDict()
        self._lock, self._turns = threading.Lock(), dict[Path, threading.RLock]()

    def get(self, folder: Path, read: Callable[[Path], T], make: Callable[[], T]) -> T:
        """The one that was made before, else `read` from its folder, else made and saved there.

        A folder that `read` refuses (ValueError) is made anew, one that cannot be written is left.
        """
        with self._lock:
            turn = self._turns.setdefault(folder, threading.RLock())
        with turn:
            found = self._held.get(folder)
            if found is None:
                found = _read_or_made(folder, read, make)
            with self._lock:
                self._held[folder] = found
                self._held.move_to_end(folder)
                while len(self._held) > HELD:
                    self._held.popitem(last=False)
            return found

    def clear(self) -> None:
        """Forget what this process holds."""
        with self._lock:
            self._held.clear()


def _read_or_made(folder: Path, read: Callable[[Path], T], make: Callable[[], T]) -> T:
    there = os.path.isdir(folder)  # Path.is_dir raises where a folder above cannot be read
    if there:
        try:
            return read(folder)
        except (OSError, ValueError) as error:
            _log.warning("%s is made anew: %s", folder, error)
    made = make()
    part = folder.with_name(f"{folder.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        made.save(part)
        if there:  # damaged
            shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)  # fails where another process was first
    except Exception as error:  # Orbax fails in many ways, and what was made is not lost
        _log.info("%s is not kept: %s", folder, error)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return made
