"""The largest and smallest values of a vector kept beside a codec that sees a narrower range.

GEAR (arXiv:2403.05527, sec. 3) and KVQuant (arXiv:2401.18079, sec. 3.4): per-vector outliers.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax

from .codec import Beside, Codec, Fitting
from .lanes import apart, as_rows, from_rows, rows_for, side_by_side
from .levels import StaticLevels
from .scales import as_half, outlier_bits, outliers_of
from .tiles import Tile


@dataclass(frozen=True)
class Outliers(Beside):
    """`codec` with the outliers of each vector stored apart, value (16 bits) and index (a byte).

    A vector is one token's channels (`axis="token"`) or one channel over the tokens of a block
    (`axis="channel"`). Its largest and its smallest values, `share` of it in all and at least one
    of each, are replaced by the vector's mean or median before the codec encodes it. Where it runs:
    plain XLA, and decode attention of the kernels with "token" beside codecs that it reads.

    Values come in pairs, number i of the large ones and of the small ones: `scales.outlier_bits`
    keeps such a pair.

    Rows: those of the codec first, then the outliers': with "token" `count` rows of indices and of
    values, lane t for token t; with "channel" the numbers of one channel after the other,
    `lanes.as_rows`.
    """

    codec: Codec
    share: float
    axis: Literal["token", "channel"] = "token"
    fill: Literal["mean", "median"] = "mean"
    head_dim: int = 0  # given by `for_block`
    tokens: int = 0

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share} of outliers must lie between 0 and 1")
        if self._length > 256:
            raise ValueError(
                f"outliers are counted by a byte: a vector of {self._length} values is longer than "
                "256"
            )

    @property
    def separable(self) -> bool:
        """Whether a token's lane stands for itself."""
        return self.axis == "token" and self.codec.separable

    def tiles(self, head_dim: int, *others: Codec) -> tuple[Tile, ...] | None:
        """Those of the codec, where a token has its outliers: its rows come first."""
        return self.codec.tiles(head_dim, *others) if self.axis == "token" else None

    @property
    def native(self) -> tuple[int, int] | None:
        """See `Codec.native`: where a token has its outliers, and the codec is known."""
        if self.axis == "channel" or self.codec.native is None:
            return None
        code, number = self.codec.native
        return code + 256 * self.count, number

    def fit(self, x: Array, fisher: Array, key: Array, how: Fitting) -> Array:
        """The outliers do not count."""
        if isinstance(self.codec, StaticLevels):  # tells them on a scale that it learns first
            return self.codec.fit(x, fisher, key, how, outliers=self.share)
        x, taken = self.without_outliers(x)
        return self.codec.fit(x, jnp.where(taken, 0.0, fisher), key, how)

    @property
    def count(self) -> int:
        """Outliers of a vector, as many large ones as small ones."""
        return 2 * max(1, round(self.share * self._length / 2))

    @property
    def _length(self) -> int:
        return self.head_dim if self.axis == "token" else self.tokens

    @property
    def _outlier_rows(self) -> int:
        if self.axis == "token":
            return self.count
        return rows_for(self.head_dim * self.count, self.tokens)

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        return self.codec.rows(head_dim) + self._outlier_rows

    @property
    def meta_rows(self) -> int:
        """float16 metadata rows of one block."""
        return self.codec.meta_rows + self._outlier_rows

    def encode(self, x: Array) -> tuple[Array, Array]:
        """`[..., d, T]` to uint8 `[..., rows, T]` and metadata float16 `[..., meta_rows, T]`."""
        index = self._largest(x)
        values = jnp.take_along_axis(self._as_vectors(x.astype(jnp.float32)), index, axis=-1)
        index, values = _in_order(index, values)
        payload, meta = self.codec.encode(self._replaced(x, index)[0])
        payload = jnp.concatenate([payload, self._packed(index.astype(jnp.uint8))], axis=-2)
        return payload, jnp.concatenate([meta, self._packed(values)], axis=-2)

    def without_outliers(self, x: Array) -> tuple[Array, Array]:
        """`[..., d, T]` as the codec sees it, float32, and where the outliers are, bool."""
        return self._replaced(x, self._largest(x))

    def _replaced(self, x: Array, index: Array) -> tuple[Array, Array]:
        """`without_outliers` of the outliers at `index [..., vectors, count]`."""
        vectors = self._as_vectors(x.astype(jnp.float32))
        middle_of = {"mean": jnp.mean, "median": jnp.median}[self.fill]
        middle = middle_of(vectors, axis=-1, keepdims=True)
        taken = (jnp.arange(self._length) == index[..., None]).any(axis=-2)
        return self._as_vectors(jnp.where(taken, middle, vectors)), self._as_vectors(taken)

    def _largest(self, x: Array) -> Array:
        """Index of the largest, then the smallest values `[..., vectors, count]`: on the codec's
        own scale where channels have theirs.
        """
        codec = self.codec
        x = codec.rank(x) if isinstance(codec, StaticLevels) else x.astype(jnp.float32)
        vectors = self._as_vectors(x)
        both = [lax.top_k(sign * vectors, self.count // 2)[1] for sign in (1, -1)]
        return jnp.concatenate(both, axis=-1)

    def decode(self, payload: Array, meta: Array) -> Array:
        """Back to float32 `[..., d, n * T]`, of one block or n that lie side by side."""
        payload, meta = apart(payload, self.tokens), apart(meta, self.tokens)
        rows, meta_rows = payload.shape[-2] - self._outlier_rows, self.codec.meta_rows
        decoded = self.codec.decode(payload[..., :rows, :], meta[..., :meta_rows, :])
        vectors = self._as_vectors(decoded)
        index = self._unpacked(payload[..., rows:, :])
        stored = self._unpacked(meta[..., meta_rows:, :])
        values = jnp.concatenate(outliers_of(*jnp.split(stored, 2, axis=-1)), axis=-1)
        for i in range(self.count):
            here = jnp.arange(self._length) == index[..., i, None]
            vectors = jnp.where(here, values[..., i, None], vectors)
        return side_by_side(self._as_vectors(vectors))

    def _as_vectors(self, x: Array) -> Array:
        """`[..., d, T]` with the axis of a vector last, or back."""
        return jnp.swapaxes(x, -1, -2) if self.axis == "token" else x

    def _packed(self, numbers: Array) -> Array:
        """`[..., vectors, count]` as rows of T lanes."""
        if self.axis == "token":
            return jnp.swapaxes(numbers, -1, -2)
        return as_rows(numbers, self.tokens)

    def _unpacked(self, rows: Array) -> Array:
        if self.axis == "token":
            return jnp.swapaxes(rows, -1, -2)
        return from_rows(rows, self.head_dim, self.count)


def _in_order(index: Array, values: Array) -> tuple[Array, Array]:
    """Indices, the larger value of each pair first, and the values as float16 arrays keep them;
    `[..., count]`, float32 values.
    """
    (first, second), (first_at, second_at) = (jnp.split(x, 2, axis=-1) for x in (values, index))
    turned = first < second  # where a codec ranks on a scale of its own
    larger, smaller = jnp.where(turned, second, first), jnp.where(turned, first, second)
    both = [jnp.where(turned, second_at, first_at), jnp.where(turned, first_at, second_at)]
    index = jnp.concatenate(both, axis=-1)
    return index, as_half(jnp.concatenate(outlier_bits(larger, smaller), axis=-1))


def beneath(codec: Codec) -> Any:
    """The codec without the outliers that are kept beside it."""
    return codec.codec if isinstance(codec, Outliers) else codec
