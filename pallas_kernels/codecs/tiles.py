"""Tiles: the pieces in which kernels read and write a block, so that they never slice, join or
reshape a value.

A tile is a range of channels of one tensor that shares a byte plane and a group; every codec cuts
its blocks into tiles with `codec.tiles(head_dim)`. The functions of a tile work on plain arrays
`[channels, T]`, so the Triton and the TPU kernels inline them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jax import Array

from .scales import scale_of, zero_of


@dataclass(frozen=True)
class Tile:
    """Channels `[channel, channel + channels)` of one tensor (K or V) of a block.

    `rows`: the first payload row of each byte plane that the tile reads, `channels` rows each (one
    plane, or one a byte for exact types); none where codes are looked up in a learned table
    (`packing.code_of`). `scale_row`, `zero_row`: metadata rows of scale and zero point, None where
    there is none: the value is `scale * code + zero`.
    """

    channel: int
    channels: int
    rows: tuple[int, ...]
    scale_row: int | None
    zero_row: int | None
    # byte planes int32 [channels, T] -> float32 codes [channels, T]
    unpack: Callable[[Sequence[Array]], Array]

    def value(self, codes: Array, number: Callable[[int], Array]) -> Array:
        """The values float32 `[channels, T]` of codes; `number(row)` reads a metadata row `[T]` as
        it is stored (`scales`).
        """
        scale, zero = self.scale_zero(number)
        scaled = codes if scale is None else scale[None, :] * codes
        return scaled if zero is None else scaled + zero[None, :]

    def scale_zero(self, number: Callable[[int], Array]) -> tuple[Array | None, Array | None]:
        """Scale and zero point float32, as far as there are any; `number(row)` reads a metadata row
        as it is stored.
        """
        if self.scale_row is None:
            return None, None
        scale = number(self.scale_row)
        return scale_of(scale), None if self.zero_row is None else zero_of(
            scale, number(self.zero_row)
        )


def cut_points(head_dim: int, codecs: Iterable) -> tuple[int, ...]:
    """Channel boundaries 0 ... head_dim at which every plane and group of all `codecs` begins, the
    same within every plane.
    """
    codecs, points = tuple(codecs), {0}
    while True:
        more = set(points)
        for codec in codecs:
            width, group = codec.plane_channels(head_dim), head_dim // codec.scale_groups
            inside = {c % width for c in more} | {c % width for c in range(0, head_dim, group)}
            more |= {plane + c for plane in range(0, head_dim, width) for c in inside}
        if more == points:
            return (*sorted(points), head_dim)
        points = more
