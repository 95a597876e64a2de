"""gguf's reader of metadata, taking arrays whole.

`gguf.GGUFReader` slices a memory map several times for each entry of an array, which takes 6 to
12 s for a vocabulary of 150,000 tokens and its merges.
"""

import struct
import sys
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

_HEAD = (
    12  # bytes before an array's values: a uint32, the type of its items, and a uint64, how many
)


class WholeArrays(GGUFReader):
    """`GGUFReader` whose fields of numbers have one part, those of strings one part a string:
    `contents()` is the same.

    What is overridden is private to `gguf`: where another version has other names, its own slower
    methods run.
    """

    def _get(self, *args: Any, **kwargs: Any) -> np.ndarray:
        self.data = np.asarray(self.data)  # a slice of np.memmap takes ten times as long
        return super()._get(*args, **kwargs)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[np.ndarray], list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        raw_item = self._get(orig_offs, np.uint32)[0]
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        number = self.gguf_scalar_to_np.get(raw_item)
        if number is not None:
            parts = [self._numbers(orig_offs + _HEAD, number, count)]
            size = _HEAD + parts[0].nbytes
        elif raw_item == GGUFValueType.STRING:
            size, parts = self._strings(orig_offs + _HEAD, count)
            size += _HEAD
        else:  # arrays of arrays
            return super()._get_field_parts(orig_offs, raw_type)
        items = [GGUFValueType(raw_item)] if count else []  # as gguf has it
        return size, parts, list(range(len(parts))), [GGUFValueType.ARRAY, *items]

    def _numbers(self, start: int, dtype: type[np.generic], count: int) -> np.ndarray:
        self._check_end(start + count * np.dtype(dtype).itemsize)
        return self._get(start, dtype, count)

    def _strings(self, start: int, count: int) -> tuple[int, list[np.ndarray]]:
        """The bytes that `count` strings take, their lengths included, and each one's own."""
        little = (sys.byteorder == "little") == (self.byte_order == "I")
        length = struct.Struct("<Q" if little else ">Q")
        parts, at = [], start
        for _ in range(count):
            self._check_end(at + 8)
            end = at + 8 + length.unpack_from(self.data.data, at)[0]
            self._check_end(end)
            parts.append(self.data[at + 8 : end])
            at = end
        return at - start, parts

    def _check_end(self, end: int) -> None:
        if end > len(self.data):
            raise ValueError(
                f"an array must end within the file's {len(self.data)} bytes, not at {end}"
            )
