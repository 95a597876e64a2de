"""The accesses of device memory of an abstract execution (traffic.py): loads, stores, atomics and
DMAs, each counted as it would happen.
"""

from math import prod
from typing import Any

import jax
import numpy as np

from benchmarks.roofline.traffic_call import KernelTraffic, Traffic
from benchmarks.roofline.traffic_values import Memory, access_key, distinct_elements, region_shape


class Unknown:
    """A value of which only the shape is known."""


UNKNOWN = Unknown()


class Accesses:
    """What a walk knows of the kernel at hand, and the primitives that touch memory."""

    def __init__(self):
        self.traffic = Traffic()
        self.kernel: KernelTraffic | None = None  # that is being walked
        self.weight = 1.0
        self.doubt = 0  # branches that may not be taken
        self.triton = False  # whether the kernel at hand is one
        self.merged: set[Any] = set()  # loads so far that an equal one would be merged with
        self.live = True  # whether anything reads what the equation at hand gives

    def count(self, memory: Memory, elements: float, *, write: bool) -> None:
        """Add an access of device memory; memory without a name is near the core."""
        if memory.name and self.kernel is not None:
            counter = self.kernel.written if write else self.kernel.read
            counter[memory.name] = (
                counter.get(memory.name, 0) + elements * memory.dtype.itemsize * self.weight
            )

    def _touched(self, memory: Memory, transforms, mask: Any) -> float:
        """Elements that an access reaches, each once, however many lanes share it; all of its shape
        where that is not known.
        """
        size = prod(region_shape(memory.shape, transforms))
        if isinstance(mask, Unknown):
            assert self.kernel is not None
            self.traffic.assumed.add(
                f"{self.kernel.name}: a mask of {memory.name} depends on unknown data"
            )
            mask = None
        distinct = distinct_elements(transforms, mask)
        if distinct is not None:
            return distinct
        return size if mask is None else int(np.count_nonzero(mask)) * size / np.size(mask)

    def _load(self, memory: Memory, transforms, mask: Any = None, other: Any = None) -> Any:
        same = access_key(memory, transforms, mask) if memory.name and self.triton else None
        if memory.name and (same is None or same not in self.merged):
            self.count(memory, self._touched(memory, transforms, mask), write=False)
            self.merged |= {same} - {None}
        value = memory.load(transforms, mask, other)
        return UNKNOWN if value is None else value

    def _store(self, memory: Memory, transforms, value: Any, mask: Any = None) -> None:
        self.merged.clear()
        if memory.name:
            self.count(memory, self._touched(memory, transforms, mask), write=True)
        unsure = self.doubt or isinstance(value, Unknown) or isinstance(mask, Unknown)
        memory.store(
            transforms, None if unsure else value, None if isinstance(mask, Unknown) else mask
        )

    def _get(self, eqn, inputs: list[Any]) -> list[Any]:
        return [self._load(inputs[0], jax.tree.unflatten(eqn.params["tree"], inputs[1:]))]

    def _swap(self, eqn, inputs: list[Any]) -> list[Any]:
        memory, value, *rest = inputs
        transforms = jax.tree.unflatten(eqn.params["tree"], rest)
        old = self._load(memory, transforms) if self.live else UNKNOWN
        self._store(memory, transforms, value)
        return [old]

    def _addupdate(self, eqn, inputs: list[Any]) -> list[Any]:
        memory, _, *rest = inputs
        transforms = jax.tree.unflatten(eqn.params["tree"], rest)
        self._load(memory, transforms)
        self._store(memory, transforms, UNKNOWN)
        return []

    def _masked_load(self, eqn, inputs: list[Any]) -> list[Any]:
        return [self._load(*jax.tree.unflatten(eqn.params["args_tree"], inputs))]

    def _masked_swap(self, eqn, inputs: list[Any]) -> list[Any]:
        memory, transforms, value, mask = jax.tree.unflatten(eqn.params["args_tree"], inputs)
        old = self._load(memory, transforms, mask) if self.live else UNKNOWN
        self._store(memory, transforms, value, mask)
        return [old]

    def _atomic_rmw(self, eqn, inputs: list[Any]) -> list[Any]:
        memory, transforms, _, mask = jax.tree.unflatten(eqn.params["args_tree"], inputs)
        old = self._load(memory, transforms, mask)
        self._store(memory, transforms, UNKNOWN, mask)
        return [old]

    def _dma_start(self, eqn, inputs: list[Any]) -> list[Any]:
        source, target, *_ = eqn.params["tree"].unflatten(inputs)
        (source, read), (target, written) = (
            (x.ref, x.transforms) if hasattr(x, "transforms") else (x, ()) for x in (source, target)
        )
        self._store(target, written, self._load(source, read))
        return []
