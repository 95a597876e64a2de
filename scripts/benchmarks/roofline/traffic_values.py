"""Values of an abstract execution (traffic.py): memory behind Refs of which parts are known, and
primitives computed by NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

LARGEST_MEMORY = 1 << 20  # elements of scratch and of results whose values are kept


@dataclass(eq=False)
class Memory:
    """What a Ref names. `values` are the numbers where `known`; both None as long as nothing is
    known.

    Accesses of memory with a `name` are counted. `kept`: whether known numbers that a kernel writes
    are remembered. `blank`: what nobody has written counts as zeros, because no right kernel
    depends on it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    name: str = ""
    values: np.ndarray | None = None
    known: np.ndarray | None = None
    kept: bool = False
    blank: bool = False

    @staticmethod
    def scratch(aval) -> "Memory":
        """Uncounted, unknown memory as a Ref's abstract value describes it."""
        kept = prod(aval.shape) <= LARGEST_MEMORY and isinstance(aval.dtype, np.dtype)
        return Memory(aval.shape, aval.dtype, kept=kept, blank=kept)

    def part(self, index: tuple) -> "Memory":
        """The memory at a NumPy basic index; writes show in both. Not counted."""
        shape = np.broadcast_to(np.uint8(0), self.shape)[index].shape
        if self.kept and self.values is None:
            self.allocate()
        if self.values is None or self.known is None:
            return Memory(shape, self.dtype)
        return Memory(shape, self.dtype, "", self.values[index], self.known[index], True)

    def load(self, transforms: Sequence[Any], mask: Any, other: Any) -> np.ndarray | None:
        """The known numbers at a region, None when any is unknown."""
        if self.values is None and self.blank:
            self.allocate()
        if self.values is None or self.known is None:
            return None
        region = _region(self.values, self.known, transforms)
        if region is None or (mask is not None and not isinstance(mask, np.ndarray | np.generic)):
            return None
        values, known, index = region
        if mask is None:
            return values[index] if np.all(known[index]) else None
        index = tuple(
            np.clip(i, 0, n - 1)
            for i, n in zip(_positions(index, values.shape), values.shape, strict=True)
        )
        if not np.all(known[index] | np.logical_not(mask)):
            return None
        return np.where(
            mask, values[index], 0 if other is None or not np.ndim(other) == 0 else other
        ).astype(values.dtype)

    def store(self, transforms: Sequence[Any], value: Any, mask: Any) -> None:
        """Write known numbers (None: unknown ones, also where `mask` may let them) to a region."""
        if self.values is None and self.kept and (value is not None or self.blank):
            self.allocate()
        if self.values is None or self.known is None:
            return
        region = _region(self.values, self.known, transforms)
        if region is None:
            self.known[...] = False
            return
        values, known, index = region
        if mask is not None:
            index = tuple(
                np.broadcast_to(i, mask.shape)[mask] for i in _positions(index, values.shape)
            )
            value = None if value is None else np.broadcast_to(value, mask.shape)[mask]
        if value is not None:
            values[index] = value
        known[index] = value is not None

    def allocate(self) -> None:
        """Begin to remember values."""
        self.values, self.known = np.zeros(self.shape, self.dtype), np.full(self.shape, self.blank)


def region_shape(shape: tuple[int, ...], transforms: Sequence[Any]) -> tuple[int, ...]:
    """Shape of the part of a Ref that `transforms` (of jax.Ref) select."""
    for transform in transforms:
        if hasattr(transform, "indices"):
            shape = tuple(int(n) for n in transform.get_indexer_shape())
        elif hasattr(transform, "permutation"):
            shape = tuple(shape[i] for i in transform.permutation)
        elif hasattr(transform, "shape"):
            shape = transform.shape
        else:
            raise NotImplementedError(f"{transform} of a Ref")
    return shape


def distinct_elements(transforms: Sequence[Any], mask: Any) -> int | None:
    """Different elements that integer arrays address where `mask` is set; None where they are not
    known or slices take part.
    """
    if len(transforms) != 1 or not hasattr(transforms[0], "indices"):
        return None
    index, shape = transforms[0].indices, transforms[0].shape
    if not all(isinstance(i, np.ndarray | np.generic | int) for i in index) or not any(
        np.ndim(i) for i in index
    ):
        return None
    place = np.zeros((), np.int64)
    for i, n in zip(index, shape, strict=True):
        place = place * n + i
    return len(np.unique(place if mask is None else place[np.broadcast_to(mask, place.shape)]))


def access_key(memory: Memory, transforms: Sequence[Any], mask: Any) -> tuple | None:
    """Equal for accesses of the same elements in the same order; None where that is not known."""
    if len(transforms) != 1 or not hasattr(transforms[0], "indices"):
        return None
    parts = [
        (i.start, i.size, i.stride) if hasattr(i, "stride") and hasattr(i, "start") else (i,)
        for i in transforms[0].indices
    ]
    numbers = [i for part in parts for i in part] + ([] if mask is None else [mask])
    if not all(isinstance(i, int | np.ndarray | np.generic) for i in numbers):
        return None
    return (
        id(memory),
        *map(len, parts),
        mask is None,
        *((np.shape(i), np.asarray(i).tobytes()) for i in numbers),
    )


def _region(
    values: np.ndarray, known: np.ndarray, transforms: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, tuple] | None:
    """Views of both arrays and an index of the last transform into them; None when the place is not
    known.
    """
    index: tuple = (slice(None),) * values.ndim
    for transform in transforms:
        values, known = values[index], known[index]
        index = (slice(None),) * values.ndim
        if hasattr(transform, "indices"):
            parts = [_dimension(i) for i in transform.indices]
            if any(part is None for part in parts):
                return None
            index = tuple(parts)
        elif hasattr(transform, "permutation"):
            values, known = (
                values.transpose(transform.permutation),
                known.transpose(transform.permutation),
            )
        else:
            return None
    return values, known, index


def _dimension(index: Any) -> Any:
    """One entry of an indexer as a NumPy index, None when it is not known."""
    if not hasattr(index, "size") or not hasattr(index, "stride"):
        return index if isinstance(index, int | np.ndarray | np.generic) else None
    if not all(isinstance(i, int | np.ndarray | np.generic) for i in (index.start, index.size)):
        return None
    return slice(int(index.start), int(index.start) + int(index.size) * index.stride, index.stride)


def _positions(index: tuple, shape: tuple[int, ...]) -> tuple:
    """An index of slices and scalars, or of arrays and scalars alone, as integer arrays (so that it
    can be masked).
    """
    if not any(isinstance(i, slice) for i in index):
        return index
    if any(np.ndim(i) for i in index if not isinstance(i, slice)):
        raise NotImplementedError("masked access through slices and arrays at once")
    ranges = [
        np.arange(*i.indices(n)) if isinstance(i, slice) else i
        for i, n in zip(index, shape, strict=True)
    ]
    grids = iter(np.meshgrid(*(r for r in ranges if np.ndim(r)), indexing="ij"))
    return tuple(next(grids) if np.ndim(r) else r for r in ranges)


def _divide(x, y, **_):
    if np.issubdtype(np.result_type(x), np.integer):
        return np.where(y == 0, -1, np.trunc(np.divide(x, y, dtype=np.float64))).astype(x.dtype)[()]
    return (x / y).astype(x.dtype)


def _select(which, *cases, aval, **_):
    if len(cases) == 2:
        return np.where(which, cases[1], cases[0]).astype(aval.dtype)[()]
    return np.choose(which, cases).astype(aval.dtype)[()]


def _broadcast_in_dim(x, *, shape, broadcast_dimensions, **_):
    spread = [1] * len(shape)
    for i, n in zip(broadcast_dimensions, np.shape(x), strict=True):
        spread[i] = n
    return np.broadcast_to(np.reshape(x, spread), shape)


def _iota(*, dtype, shape, dimension, **_):
    spread = [1] * len(shape)
    spread[dimension] = shape[dimension]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(spread), shape)


def _binary(function):
    return lambda x, y, **_: function(x, y)


def _reduction(function):
    return lambda x, *, axes, aval, **_: function(x, axis=tuple(axes)).astype(aval.dtype)


# primitive name -> function(*inputs, aval of the first output, **params); integers and booleans
# wrap and divide as in XLA
EVALUATE = {
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "mul": _binary(np.multiply),
    "max": _binary(np.maximum),
    "min": _binary(np.minimum),
    "and": _binary(np.bitwise_and),
    "or": _binary(np.bitwise_or),
    "xor": _binary(np.bitwise_xor),
    "eq": _binary(np.equal),
    "ne": _binary(np.not_equal),
    "lt": _binary(np.less),
    "le": _binary(np.less_equal),
    "gt": _binary(np.greater),
    "ge": _binary(np.greater_equal),
    "shift_left": _binary(np.left_shift),
    "shift_right_arithmetic": _binary(np.right_shift),
    "div": _divide,
    "rem": _binary(np.fmod),
    "not": lambda x, **_: np.invert(x),
    "neg": lambda x, **_: np.negative(x),
    "sign": lambda x, **_: np.sign(x),
    "abs": lambda x, **_: np.abs(x),
    "select_n": _select,
    "convert_element_type": lambda x, *, new_dtype, **_: x.astype(new_dtype),
    "broadcast_in_dim": _broadcast_in_dim,
    "broadcast_to": lambda x, *, shape, **_: np.broadcast_to(x, shape),
    "reshape": lambda x, *, new_sizes, **_: np.reshape(x, new_sizes),
    "squeeze": lambda x, *, dimensions, **_: np.squeeze(x, tuple(dimensions)),
    "transpose": lambda x, *, permutation, **_: np.transpose(x, permutation),
    "iota": _iota,
    "reduce_sum": _reduction(np.sum),
    "reduce_max": _reduction(np.max),
    "reduce_min": _reduction(np.min),
    "reduce_and": _reduction(np.all),
    "reduce_or": _reduction(np.any),
}
