"""What codecs have in common whose codes are looked up in a learned table."""

from collections.abc import Sequence

from jax import Array

from .plain import PlainXLA
from .tiles import Tile, cut_points


class LookedUp(PlainXLA):
    """A codec of learned numbers: plain XLA runs it, and decode attention of all kernels reads it.
    Frozen dataclasses derive from it.
    """

    in_decode_kernels = True
    scale_groups = 1
    scale_row: int | None = None
    zero_row: int | None = None

    def plane_channels(self, head_dim: int) -> int:
        """All channels: each is looked up by itself."""
        return head_dim

    def tiles(self, head_dim: int, *others) -> tuple[Tile, ...]:
        """The tiles of a block, cut as those of the codecs `others`: no byte planes, nothing to
        unpack.
        """
        points = cut_points(head_dim, (self, *others))
        return tuple(
            Tile(a, b - a, (), self.scale_row, self.zero_row, _unpack)
            for a, b in zip(points, points[1:], strict=False)
        )


def _unpack(planes: Sequence[Array]) -> Array:
    raise TypeError("codes of a learned table are looked up, not unpacked")
