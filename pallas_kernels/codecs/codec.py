"""`Codec`: how one tensor (K or V) of a block of tokens is stored, the base of all of them; and
`Tile`, what kernels read of it at a time (`tiles`).
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
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
    unpack: Callable[[Sequence[Array]], Array]  # int32 byte planes -> float32, all [channels, T]

    def value(self, codes: Array, number: Callable[[int], Array]) -> Array:
        """Float32 `[channels, T]` of codes; `number(row)` reads a stored metadata row `[T]`."""
        scale, zero = self.scale_zero(number)
        scaled = codes if scale is None else scale[None, :] * codes
        return scaled if zero is None else scaled + zero[None, :]

    def scale_zero(self, number: Callable[[int], Array]) -> tuple[Array | None, Array | None]:
        """Scale and zero point float32, if any; `number(row)` reads a stored metadata row."""
        if self.scale_row is None:
            return None, None
        stored = number(self.scale_row)
        scale = scale_of(stored)
        return scale, None if self.zero_row is None else zero_of(stored, number(self.zero_row))


class Fitting(NamedTuple):
    """How learned codecs are fitted.

    Attributes:
        kmeans: `(x [P, n, c], weight [P, n], key, clusters)` to centroids `[P, clusters, c]`.
        q_norm: whether levels keep mean and deviation (KVQuant's Q-Norm); None: at two bits or
            fewer.
    """

    kmeans: Callable[[Array, Array, Array, int], Array]
    q_norm: bool | None = None


class Codec(ABC):
    """One tensor (K or V) of a tier. Subclasses are frozen dataclasses, part of the compile key.

    `rows`, `encode` and `decode` are enough for plain XLA, which reads decoded blocks; a codec with
    metadata gives `meta_rows` too. `register_codec` makes names of formats stand for it.
    """

    # whether a token's lane can be moved, dropped or overwritten without touching others; if not,
    # only whole blocks are encoded
    separable = True

    @abstractmethod
    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block.

        Raises:
            ValueError: it cannot hold so many channels.
        """

    @abstractmethod
    def encode(self, x: Array) -> tuple[Array, Array]:
        """A block `[..., head_dim, T]` to payload uint8 `[..., rows, T]` and metadata float16
        `[..., meta_rows, T]` (`without_meta` where there is none).
        """

    @abstractmethod
    def decode(self, payload: Array, meta: Array) -> Array:
        """Back to float32 `[..., head_dim, n * T]`, of one block or n that lie side by side."""

    @property
    def meta_rows(self) -> int:
        """float16 metadata rows of one block."""
        return 0

    def for_block(self, head_dim: int, tokens: int) -> "Codec":
        """The codec of blocks `[head_dim, tokens]`; itself where it does not depend on them.

        Raises:
            ValueError: it cannot hold such blocks.
        """
        del head_dim, tokens
        return self

    def key_logits(self, q: Array, payload: Array, meta: Array) -> Array:
        """`q [..., G, d]` times the decoded block, `[..., G, T]`."""
        return jnp.einsum("...Gc,...ct->...Gt", q, self.decode(payload, meta))

    def value_mix(self, p: Array, payload: Array, meta: Array, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the decoded block, `[..., G, d]`; tokens not `valid [...,
        T]` count as zeros.
        """
        values = jnp.where(valid[..., None, :], self.decode(payload, meta), 0)
        return jnp.einsum("...Gt,...ct->...Gc", p, values)

    def demote(self, target: "Codec", payload: Array, meta: Array) -> tuple[Array, Array]:
        """Requantise a block to `target`, through float32."""
        return target.encode(self.decode(payload, meta))

    def tiles(self, head_dim: int, *others: "Codec") -> tuple[Tile, ...] | None:
        """The pieces in which Triton and TPU kernels read a block, cut as those of the codecs
        `others` are (`tiles.Tiled`); None: they do not read it.
        """
        del head_dim, others
        return None

    @property
    def native(self) -> tuple[int, int] | None:
        """Code and number (groups, or channels that share a code) by which native/codecs.h reads a
        block, a header's `ReaderOf<code>`; None: native kernels do not read it.
        """
        return None

    @property
    def learned(self) -> bool:
        """Whether it has an array that `fit` makes."""
        return False

    def table_shape(self, head_dim: int) -> tuple[int, ...] | None:
        """Shape of one head's learned array; None where nothing is learned."""
        del head_dim
        return None

    def with_table(self, table: Array | None) -> Self:
        """The codec with the arrays `[B, *table_shape]` of `B` heads; itself when None."""
        if table is None:
            return self
        return dataclasses.replace(self, table=table)  # pyright: ignore[reportArgumentType]

    def fit(self, x: Array, fisher: Array, key: Array, how: Fitting) -> Array:
        """Learn one layer's array, float32 `[K, *table_shape]`, from `x`, `fisher` float32 `[K, d,
        n]`: n tokens as a block of each head, and how much an error of each number costs.
        """
        raise TypeError(f"{self} learns nothing")


class Beside(Codec):
    """A codec that keeps more of a block beside what `codec` stores. Base of frozen dataclasses."""

    codec: Codec
    head_dim: int  # of blocks, given by `for_block`
    tokens: int

    def for_block(self, head_dim: int, tokens: int) -> "Codec":
        """The codec of blocks `[head_dim, tokens]`."""
        inner: Any = self.codec.for_block(head_dim, tokens)
        return dataclasses.replace(self, codec=inner, head_dim=head_dim, tokens=tokens)  # pyright: ignore

    @property
    def learned(self) -> bool:
        """Whether `codec` has an array that `fit` makes."""
        return self.codec.learned

    def table_shape(self, head_dim: int) -> tuple[int, ...] | None:
        """That of `codec`."""
        return self.codec.table_shape(head_dim)

    def with_table(self, table: Array | None) -> Self:
        """With the arrays in `codec`."""
        inner: Any = self.codec.with_table(table)
        return dataclasses.replace(self, codec=inner)  # pyright: ignore[reportArgumentType]

    def fit(self, x: Array, fisher: Array, key: Array, how: Fitting) -> Array:
        """That of `codec`: what is kept beside it does not change what it sees."""
        return self.codec.fit(x, fisher, key, how)


def without_meta(x: Array) -> Array:
    """The metadata of a block `[..., d, T]` that has none, float16 `[..., 0, T]`."""
    return jnp.zeros((*x.shape[:-2], 0, x.shape[-1]), jnp.float16)
