"""Uniform asymmetric quantisation per token and channel group (DiffKV, arXiv 2412.03131 5.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import jax.numpy as jnp
from jax import Array

from . import scales
from .codec import Codec
from .halves import round_half_even
from .packing import pack_planes, pack_tiles, packed_rows, unpack_planes
from .tiles import Scalar, Tile

BITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Uniform(Scalar):
    """Codec of one tensor (K or V): `bits` a channel, `groups` of contiguous channels with their
    own scale and zero point.

    A block is `[..., head_dim, T]`; its payload is uint8 `[..., rows, T]` and its metadata float16
    `[..., 2 * groups, T]`, all scales first, then all zero points, as `scales` keeps them.
    """

    bits: int
    groups: int = 1

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits={self.bits} must be one of {BITS}")
        if self.groups < 1:
            raise ValueError(f"groups={self.groups} must be at least 1")

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        if (head_dim * self.bits) % 8 or head_dim % self.groups:
            raise ValueError(
                f"head_dim={head_dim} must be a multiple of groups={self.groups} and of "
                f"{8 // self.bits}, the channels in a byte at {self.bits} bits; choose other "
                "groups or bits"
            )
        return packed_rows(self.bits, head_dim)

    @property
    def meta_rows(self) -> int:
        """float16 metadata rows of one block."""
        return 2 * self.groups

    @property
    def native(self) -> tuple[int, int]:
        """See `Codec.native`."""
        return self.bits, self.groups

    def encode(self, x: Array) -> tuple[Array, Array]:
        """Quantise `[..., d, T]` to (payload, metadata), half to even, with `scales.grid`."""
        grouped = _grouped(x.astype(jnp.float32), self.groups)  # [..., groups, d / groups, T]
        low, high = grouped.min(axis=-2), grouped.max(axis=-2)
        scale, zero, *stored = scales.grid(low, high, 2**self.bits - 1)
        step = jnp.where(scale > 0, scale, 1.0)
        codes = jnp.round((grouped - zero[..., None, :]) / step[..., None, :])
        codes = jnp.clip(codes, 0, 2**self.bits - 1).astype(jnp.uint8).reshape(x.shape)
        return pack_planes(codes, self.bits), scales.as_half(jnp.concatenate(stored, axis=-2))

    def decode(self, payload: Array, meta: Array) -> Array:
        """Dequantise to float32 `[..., d, T]`: `scale * code + zero` with the stored numbers."""
        scale, zero = self._scale_zero(meta)
        codes = _grouped(unpack_planes(payload, self.bits).astype(jnp.float32), self.groups)
        x = scale[..., None, :] * codes + zero[..., None, :]
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    def key_logits(self, q: Array, payload: Array, meta: Array) -> Array:
        """`q [..., G, d]` times the decoded block, `[..., G, T]`; scale, zero beside the dot."""
        scale, zero = self._scale_zero(meta)
        codes = _grouped(unpack_planes(payload, self.bits).astype(jnp.float32), self.groups)
        q = q.reshape(*q.shape[:-1], self.groups, -1)
        dots = jnp.einsum("...Ggc,...gct->...gGt", q, codes)
        sums = jnp.einsum("...Ggc->...gG", q)
        return (dots * scale[..., None, :] + sums[..., None] * zero[..., None, :]).sum(axis=-3)

    def value_mix(self, p: Array, payload: Array, meta: Array, valid: Array) -> Array:
        """Weights `p [..., G, T]` times the decoded block, `[..., G, d]`; tokens not `valid [...,
        T]` are never read.
        """
        scale, zero = self._scale_zero(jnp.where(valid[..., None, :], meta, 0))
        codes = _grouped(unpack_planes(payload, self.bits).astype(jnp.float32), self.groups)
        weights = p[..., None, :, :] * scale[..., :, None, :]  # [..., groups, G, T]
        mixed = jnp.einsum("...gGt,...gct->...Ggc", weights, codes)
        mixed = mixed + jnp.einsum("...Gt,...gt->...Gg", p, zero)[..., None]
        return mixed.reshape(*mixed.shape[:-2], -1)

    def demote(self, target: Codec, payload: Array, meta: Array) -> tuple[Array, Array]:
        """Requantise to `target`: with the same groups and no more bits on the integer codes alone,
        which equals quantising the decoded block.

        The extremes of a group are codes 0 and `2**bits - 1`, so both tiers share the zero point
        and the scales differ by the whole factor `r = (2**bits - 1) / (2**target.bits - 1)`.
        """
        if not self.can_demote_to(target):
            return super().demote(target, payload, meta)
        ratio = (2**self.bits - 1) // (2**target.bits - 1)
        if ratio == 1:
            return payload, meta
        codes = (unpack_planes(payload, self.bits).astype(jnp.int32) + ratio // 2) // ratio
        stored = _demoted(meta[..., : self.groups, :], meta[..., self.groups :, :], ratio)
        return pack_planes(codes, target.bits), scales.as_half(jnp.concatenate(stored, axis=-2))

    def can_demote_to(self, target: Codec) -> TypeGuard["Uniform"]:
        """Whether `demote` works on integer codes: same groups, no more bits."""
        if not isinstance(target, Uniform):
            return False
        return target.groups == self.groups and target.bits <= self.bits

    def plane_channels(self, head_dim: int) -> int:
        """Channels that one byte plane holds."""
        return self.rows(head_dim)

    @property
    def scale_groups(self) -> int:
        """Groups of channels with their own scale and zero point."""
        return self.groups

    def tile(self, head_dim: int, channel: int, channels: int) -> Tile:
        """One plane of codes, with the scale and the zero point of its group."""
        width, group = self.plane_channels(head_dim), channel // (head_dim // self.groups)
        unpack = partial(_plane, shift=channel // width * self.bits, bits=self.bits)
        return Tile(channel, channels, (channel % width,), group, self.groups + group, unpack)

    def encode_tiles(
        self, tiles: Sequence[Tile], values: Sequence[Array]
    ) -> tuple[list[Array], dict[int, Array]]:
        """`encode` tile by tile: values float32 `[channels, T]` to codes (int32, same shapes) and
        `{metadata row: bits int32 [T]}`.
        """
        most = 2**self.bits - 1
        low, high, meta = {}, {}, {}
        for tile, x in zip(tiles, values, strict=True):
            group, least, largest = tile.scale_row, x.min(axis=0), x.max(axis=0)
            low[group] = jnp.minimum(low[group], least) if group in low else least
            high[group] = jnp.maximum(high[group], largest) if group in high else largest
        zeros, steps = {}, {}
        for group, least in low.items():
            scale, zeros[group], *stored = scales.grid(least, high[group], most)
            meta[group], meta[self.groups + group] = stored
            steps[group] = jnp.where(scale > 0, scale, 1.0)
        codes = []
        for tile, x in zip(tiles, values, strict=True):
            group = tile.scale_row
            code = round_half_even((x - zeros[group][None, :]) / steps[group][None, :])
            codes.append(jnp.clip(code, 0.0, float(most)).astype(jnp.int32))
        return codes, meta

    def demote_tiles(
        self,
        target: Scalar,
        head_dim: int,
        codes: Callable[[Tile], Array],
        number: Callable[[int], Array],
    ) -> tuple[tuple[Tile, ...], list[Array], dict[int, Array]]:
        """On the integer codes where `demote` is."""
        if not self.can_demote_to(target):
            return super().demote_tiles(target, head_dim, codes, number)
        ratio, numbers = (2**self.bits - 1) // (2**target.bits - 1), {}
        for row in range(self.groups):
            below = row + self.groups
            numbers[row], numbers[below] = _demoted(number(row), number(below), ratio)
        whole = (codes(tile).astype(jnp.int32) for tile in self.tiles(head_dim, target))
        lower = [(code + ratio // 2) // ratio for code in whole]
        return target.tiles(head_dim, self), lower, numbers

    def pack_tiles(self, tiles: Sequence[Tile], codes: Sequence[Array]) -> dict[int, Array]:
        """Codes of all tiles to `{first payload row: bytes int32 [channels, T]}`, each row once."""
        return pack_tiles(tiles, codes, self.bits)

    def _scale_zero(self, meta: Array) -> tuple[Array, Array]:
        scale, zero = meta[..., : self.groups, :], meta[..., self.groups :, :]
        return scales.scale_of(scale), scales.zero_of(scale, zero)


@dataclass(frozen=True)
class Grouped(Codec):
    """`Uniform` with groups of `channels` contiguous channels, at most all: what `for_block` gives
    once head_dim is known.

    `as_tokens`: beside keys a channel of which T tokens share numbers (KIVI). Where the two group
    sizes are one number, `channels` = T, it need not divide head_dim: the nearest divisor is taken
    (`nearest_divisor`).
    """

    bits: int
    channels: int
    as_tokens: bool = False

    def __post_init__(self):
        Uniform(self.bits)  # checks them
        if self.channels < 1:
            raise ValueError(
                f"channels={self.channels} of a group must be at least 1, as in 'K4g32V4g32'"
            )

    def for_block(self, head_dim: int, tokens: int) -> Uniform:
        """The codec of blocks with `head_dim` channels."""
        channels = min(self.channels, head_dim)
        if self.as_tokens and channels == tokens:
            channels = nearest_divisor(head_dim, channels)
        if head_dim % channels:
            raise ValueError(
                f"head_dim={head_dim} must be a multiple of the groups' channels={self.channels}, "
                f"as in 'K4g32V4g32'; groups of {nearest_divisor(head_dim, channels)} would do"
            )
        return Uniform(self.bits, head_dim // channels)

    def rows(self, head_dim: int) -> int:
        """Payload rows (bytes a token) of one block."""
        return self.for_block(head_dim, 0).rows(head_dim)

    def encode(self, x: Array) -> tuple[Array, Array]:
        """As the codec of `for_block`."""
        return self.for_block(*x.shape[-2:]).encode(x)

    def decode(self, payload: Array, meta: Array) -> Array:
        """As the codec of `for_block`."""
        rows, tokens = payload.shape[-2:]
        return self.for_block(rows * 8 // self.bits, tokens).decode(payload, meta)


def nearest_divisor(head_dim: int, channels: int) -> int:
    """The largest divisor of `head_dim` in half of `channels` to `channels`, or the next above."""
    divisors = [n for n in range(1, head_dim + 1) if head_dim % n == 0]
    below = [n for n in divisors if channels <= 2 * n <= 2 * channels]
    return below[-1] if below else next(n for n in divisors if n > channels or n == head_dim)


def _demoted(scale: Array, zero: Array, ratio: int) -> tuple[Array, Array]:
    """Bits of the stored numbers of a scale that is `ratio` times as large."""
    larger = scales.scale_of(scale) * float(ratio)
    zero, was_wide = scales.zero_of(scale, zero), scales.is_wide(scale)
    return scales.pair_bits(larger, zero, was_wide | scales.too_large(larger))


def _plane(planes: Sequence[Array], shift: int, bits: int) -> Array:
    return ((planes[0] >> shift) & (2**bits - 1)).astype(jnp.float32)


def _grouped(x: Array, groups: int) -> Array:
    """`[..., d, T]` to `[..., groups, d / groups, T]`."""
    return x.reshape(*x.shape[:-2], groups, -1, x.shape[-1])
