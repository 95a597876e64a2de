"""Tiles, the pieces in which kernels read and write blocks, against whole-block codecs and
NumPy.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_oracle import expected, ordinary, same_codes, same_meta

from diffkv_jax.pallas_kernels.codecs import Full, Normal, Uniform
from diffkv_jax.pallas_kernels.codecs.halves import float_to_half, half_to_float, round_half_even
from diffkv_jax.pallas_kernels.codecs.tiles import Tile
from diffkv_jax.testing.readback import decode_tensor

TOKENS = 8
CODECS = [Uniform(bits, groups) for bits in (1, 2, 4, 8) for groups in (1, 2, 4)] + [
    Full(d) for d in ("float32", "bfloat16", "float16")
]
CODECS += [Normal(bits) for bits in (1, 2, 4)]


def read_by_tiles(tiles: tuple[Tile, ...], payload: np.ndarray, meta: np.ndarray) -> np.ndarray:
    """float32 `[T, d]` of a block, put together from its tiles; every channel comes from exactly
    one.
    """
    head_dim = sum(tile.channels for tile in tiles)
    out = np.full((head_dim, payload.shape[1]), np.nan, np.float32)
    for tile in tiles:
        x = np.asarray(
            tile.unpack(
                [jnp.asarray(payload[row : row + tile.channels], jnp.int32) for row in tile.rows]
            )
        )
        if tile.scale_row is not None:
            x = x * meta[tile.scale_row].astype(np.float32)
        if tile.zero_row is not None:
            x = x + meta[tile.zero_row].astype(np.float32)
        assert np.isnan(out[tile.channel : tile.channel + tile.channels]).all()
        out[tile.channel : tile.channel + tile.channels] = x
    return out.T


def written_by_tiles(
    codec, tiles: tuple[Tile, ...], x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Payload and metadata of `[T, d]`, put together from tiles; every payload row is written
    once.
    """

    def encode(x):
        codes, meta = codec.encode_tiles(
            tiles, [x[tile.channel : tile.channel + tile.channels] for tile in tiles]
        )
        return codec.pack_tiles(tiles, codes), meta

    planes, metadata = jax.jit(encode)(jnp.asarray(x.T))
    payload = np.full((codec.rows(x.shape[1]), len(x)), -1, np.int64)
    for row, plane in planes.items():
        assert (payload[row : row + len(plane)] == -1).all()
        payload[row : row + len(plane)] = plane
    assert payload.min() >= 0 and payload.max() <= 255
    meta = np.zeros((codec.meta_rows, len(x)), np.float16)
    for row, value in metadata.items():
        meta[row] = np.asarray(value).astype(np.uint16).view(np.float16)
    assert sorted(metadata) == list(range(codec.meta_rows))
    return payload.astype(np.uint8), meta


def same_reading(tiles: tuple[Tile, ...], codec, payload: np.ndarray, meta: np.ndarray) -> None:
    """Tiles read what the oracle reads, within float32 rounding."""
    wanted = decode_tensor(codec, payload, meta)
    np.testing.assert_allclose(
        read_by_tiles(tiles, payload, meta), wanted, rtol=3e-7, atol=1e-6 * np.abs(wanted).max()
    )


@pytest.mark.daily(2)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_tiles_read_and_write_what_the_codec_does(codec, head_dim: int):
    x = ordinary(TOKENS, head_dim, 1)
    payload, meta = expected(codec, x)
    tiles = codec.tiles(head_dim)
    same_reading(tiles, codec, payload, meta)
    got_payload, got_meta = written_by_tiles(codec, tiles, x)
    same_codes(codec, x, got_payload, payload)
    same_meta(got_meta, meta)


@pytest.mark.daily(3)
@pytest.mark.parametrize(
    "one", [Uniform(8), Uniform(4, 2), Uniform(1, 4), Full("bfloat16")], ids=str
)
@pytest.mark.parametrize("other", [Uniform(4), Uniform(2, 4), Normal(2), Full("float32")], ids=str)
def test_common_tiles_have_the_same_channels(one, other):
    """Two codecs cut for each other have the same channels tile by tile, and both still read and
    write their own blocks.
    """
    x = ordinary(TOKENS, 64, 2)
    pair = one.tiles(64, other), other.tiles(64, one)
    assert [(t.channel, t.channels) for t in pair[0]] == [(t.channel, t.channels) for t in pair[1]]
    for codec, tiles in zip((one, other), pair, strict=True):
        payload, meta = expected(codec, x)
        same_reading(tiles, codec, payload, meta)
        same_codes(codec, x, written_by_tiles(codec, tiles, x)[0], payload)


@pytest.mark.parametrize(
    "kind",
    ["planes swapped", "zero point dropped", "scales swapped", "shift forgotten", "tile left out"],
)
def test_the_comparison_sees_wrong_tiles(kind: str):
    codec, x = Uniform(4, 2), ordinary(TOKENS, 64, 3)
    payload, meta = expected(codec, x)
    tiles = codec.tiles(64)
    assert len(tiles) == 2 and tiles[0].scale_row != tiles[1].scale_row
    wrong = {
        "planes swapped": [
            replace(tile, unpack=other.unpack)
            for tile, other in zip(tiles, tiles[::-1], strict=True)
        ],
        "zero point dropped": [replace(tile, zero_row=None, scale_row=None) for tile in tiles],
        "scales swapped": [
            replace(tile, scale_row=other.scale_row)
            for tile, other in zip(tiles, tiles[::-1], strict=True)
        ],
        "shift forgotten": [replace(tile, unpack=tiles[0].unpack) for tile in tiles],
        "tile left out": [tiles[0], tiles[0]],
    }[kind]
    same_reading(tiles, codec, payload, meta)
    with pytest.raises(AssertionError):
        same_reading(tuple(wrong), codec, payload, meta)


def test_half_to_float_of_every_bit_pattern():
    """All 65536 float16 numbers, the infinities and NaN included; the upper half of the int32 does
    not matter.
    """
    half = np.arange(65536, dtype=np.uint16)
    wanted = half.view(np.float16).astype(np.float32)
    for upper in (0, 0x7FFF0000, -65536):
        got = np.asarray(jax.jit(half_to_float)(half.astype(np.int32) | np.int32(upper)))
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(np.signbit(got), np.signbit(wanted))


def test_float_to_half_rounds_as_numpy():
    """Random numbers of every size, all float16 numbers, the midpoints between them (ties to even)
    and their neighbours, overflow.
    """
    rng = np.random.default_rng(0)
    # zero, subnormal and normal numbers
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = ((halves[1:].astype(np.float64) + halves[:-1]) / 2).astype(np.float32)
    x = np.concatenate(
        [halves, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))]
    )
    x = np.concatenate(
        [
            x,
            rng.normal(size=20000) * 10.0 ** rng.integers(-12, 6, 20000),
            [65519.996, 65520, 1e30, np.inf],
        ]
    ).astype(np.float32)
    x = np.concatenate([x, -x])
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16).view(np.uint16).astype(np.int32)
    np.testing.assert_array_equal(np.asarray(jax.jit(float_to_half)(x)), wanted)


def test_float_to_half_keeps_nan():
    bits = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32)
    got = np.asarray(jax.jit(float_to_half)(bits.view(np.float32)))
    assert np.isnan(got.astype(np.uint16).view(np.float16)).all()


def test_round_half_even_equals_rint():
    """Ties of both signs, random numbers, and the neighbours of ties up to 2**22."""
    ties = np.concatenate([np.arange(-300, 300), 2**22 - np.arange(1, 50)]).astype(
        np.float32
    ) + np.float32(0.5)
    random = np.random.default_rng(0).uniform(-300, 300, 10000).astype(np.float32)
    x = np.concatenate(
        [
            ties[ties < 2**22],
            np.nextafter(ties[:600], np.float32(-1e9)),
            np.nextafter(ties[:600], np.float32(1e9)),
            random,
        ]
    )
    np.testing.assert_array_equal(np.asarray(jax.jit(round_half_even)(x)), np.rint(x))
    assert (np.floor(x + 0.5) != np.rint(x)).any()  # the input tells it from rounding half up
