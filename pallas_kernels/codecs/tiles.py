"""Tiles: the pieces of a block that kernels read and write, never slicing or joining a value.

A tile is a range of channels of one tensor that shares a byte plane and a group; every codec cuts
its blocks into tiles with `codec.tiles(head_dim)`. The functions of a tile work on plain arrays
`[channels, T]`, so the Triton and the TPU kernels inline them.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from jax import Array

from .codec import Codec, Tile as Tile


def looked_up(planes: Sequence[Array]) -> Array:
    """`Tile.unpack` of codes that are looked up in a learned table, which kernels do otherwise."""
    raise TypeError("codes of a learned table are looked up, not unpacked")


def cut_points(head_dim: int, codecs: Iterable) -> tuple[int, ...]:
    """Channel boundaries 0 ... head_dim at which every plane and group of all `codecs` begins."""
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


class Tiled(Codec):
    """A codec whose blocks Triton and TPU kernels read tile by tile; a subclass says its bytes."""

    @abstractmethod
    def tile(self, head_dim: int, channel: int, channels: int) -> Tile:
        """The tile of channels `[channel, channel + channels)`, which share a plane and a group."""

    def plane_channels(self, head_dim: int) -> int:
        """Channels that one byte plane holds: all, unless said otherwise."""
        return head_dim

    @property
    def scale_groups(self) -> int:
        """Groups of channels with their own scale."""
        return 1

    def tiles(self, head_dim: int, *others: Codec) -> tuple[Tile, ...]:
        """The tiles of a block, cut at the same channels as those of `others`, `Tiled` too."""
        points = cut_points(head_dim, (self, *others))
        return tuple(self.tile(head_dim, a, b - a) for a, b in pairwise(points))


class Scalar(Tiled):
    """A codec with a code for each channel, which kernels also encode and demote by tiles."""

    @abstractmethod
    def encode_tiles(
        self, tiles: Sequence[Tile], values: Sequence[Array]
    ) -> tuple[list[Array], dict[int, Array]]:
        """`encode` tile by tile: values float32 `[channels, T]` to codes (int32, same shapes) and
        `{metadata row: bits int32 [T]}`.
        """

    @abstractmethod
    def pack_tiles(self, tiles: Sequence[Tile], codes: Sequence[Array]) -> dict[int, Array]:
        """Codes of all tiles to `{first payload row: bytes int32 [channels, T]}`, each row once."""

    def demote_tiles(
        self,
        target: "Scalar",
        head_dim: int,
        codes: Callable[[Tile], Array],
        number: Callable[[int], Array],
    ) -> tuple[tuple[Tile, ...], list[Array], dict[int, Array]]:
        """`demote` tile by tile: the tiles of `target`, and what its `encode_tiles` gives.

        `codes(tile)` reads codes float32 `[channels, T]` (`Tile.unpack`), `number(row)` one
        metadata row `[T]` as it is stored.
        """
        tiles, new_tiles = self.tiles(head_dim, target), target.tiles(head_dim, self)
        values = [tile.value(codes(tile), number) for tile in tiles]
        return new_tiles, *target.encode_tiles(new_tiles, values)
