"""The quantiser of the oracles, on numbers worked by hand."""

import numpy as np
import pytest

from diffkv_jax.testing.quantiser import (
    demote,
    demote_nested,
    dequantise,
    fake_demote,
    fake_quantise,
    pack,
    quantise,
    requantise,
    unpack,
)


def test_four_bits_by_hand():
    # min -1, max 2: scale 3/15 = 0.2; (x + 1) / 0.2 = 0, 2.5, 3.5, 15 -> 0, 2, 4, 15 with halves to
    # even
    codes, scale, zero = quantise(np.array([-1.0, -0.5, -0.3, 2.0]), 4)
    # 3/15 is not exact in binary
    assert codes[[0, 3]].tolist() == [0, 15] and codes[2] == 4 and codes[1] in (2, 3)
    assert scale == np.float16(0.2) and zero == np.float16(-1)
    np.testing.assert_allclose(
        dequantise(codes, scale, zero)[[0, 2, 3]], [-1.0, -0.2, 2.0], atol=2e-3
    )


def test_halves_round_to_even():
    # scale exactly 0.5: ratios 0, 0.5, 1.5, 2.5, 3
    codes, scale, zero = quantise(np.array([1.0, 1.25, 1.75, 2.25, 2.5]), 2)
    assert codes.tolist() == [0, 0, 2, 2, 3] and scale == 0.5 and zero == 1
    assert dequantise(codes, scale, zero).tolist() == [1.0, 1.0, 2.0, 2.0, 2.5]


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_extremes_and_constant_groups(bits):
    codes, scale, zero = quantise(np.array([[-3.0, 1.0, 5.0, 0.5], [7.0, 7.0, 7.0, 7.0]]), bits)
    assert codes[0, 0] == 0 and codes[0, 2] == 2**bits - 1
    assert (
        codes[1].tolist() == [0] * 4
        and scale[1] == 0
        and dequantise(codes, scale, zero)[1].tolist() == [7.0] * 4
    )


def test_groups_are_contiguous_channels():
    # two groups of two: (0, 3) and (10, 13), scale 1 each; one group would have scale 13/3
    codes, scale, zero = quantise(np.array([0.0, 3.0, 10.0, 13.0]), 2, groups=2)
    assert codes.tolist() == [0, 3, 0, 3] and scale.tolist() == [1, 1] and zero.tolist() == [0, 10]


def test_codes_come_from_unrounded_scale_and_zero():
    # zero 2049 is stored as 2048 (float16 keeps 11 bits); the codes are those of the exact zero
    codes, scale, zero = quantise(np.array([2049.0, 2050.0, 2052.0]), 2)
    assert (
        codes.tolist() == [0, 1, 3]
        and zero == 2048
        and dequantise(codes, scale, zero).tolist() == [2048.0, 2049.0, 2051.0]
    )


def test_scale_is_rounded_to_half():
    # 1 / 255 = 0.00392157; its float16 neighbour is 257 * 2^-16
    codes, scale, zero = quantise(np.array([0.0, 1.0]), 8)
    assert scale == np.float16(257 * 2.0**-16) and dequantise(codes, scale, zero)[1] == np.float32(
        255 * 257 * 2.0**-16
    )


@pytest.mark.parametrize(
    "bits, lower, ratio", [(8, 4, 17), (4, 2, 5), (8, 2, 85), (2, 1, 3), (8, 1, 255), (4, 1, 15)]
)
def test_nested_demotion_equals_requantising(bits, lower, ratio):
    # both extremes are there, as in every quantised group
    all_codes = np.arange(2**bits, dtype=np.uint8)
    nested = demote_nested(
        all_codes, np.array([0.25], np.float16), np.array([-3.0], np.float16), bits, lower
    )
    direct = requantise(
        all_codes, np.array([0.25], np.float16), np.array([-3.0], np.float16), lower, 1
    )
    for one, other in zip(nested, direct, strict=True):
        np.testing.assert_array_equal(one, other)
    assert nested[1] == 0.25 * ratio and nested[2] == -3
    exact = [round(code / ratio) for code in range(2**bits)]  # no ties: the ratio is odd
    assert nested[0].tolist() == exact


def test_nested_demotion_by_hand():
    # 8 to 4 bits: 8/17 -> 0, 9/17 -> 1, 25/17 -> 1, 26/17 -> 2; 4 to 2 bits: 2/5 -> 0, 3/5 -> 1,
    # 12/5 -> 2, 13/5 -> 3
    one = np.array([1.0], np.float16)
    assert demote_nested(np.array([8, 9, 25, 26, 255], np.uint8), one, one, 8, 4)[0].tolist() == [
        0,
        1,
        1,
        2,
        15,
    ]
    assert demote_nested(np.array([2, 3, 12, 13, 15], np.uint8), one, one, 4, 2)[0].tolist() == [
        0,
        1,
        2,
        3,
        3,
    ]


def test_nested_demotion_of_random_groups():
    values = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
    stored = quantise(values, 8)
    nested, direct = demote_nested(*stored, 8, 4), requantise(*stored, 4, 1)
    for one, other in zip(nested, direct, strict=True):
        np.testing.assert_array_equal(one, other)


def test_demotion_with_other_groups_goes_through_the_values():
    values = np.arange(8, dtype=np.float32)
    stored = quantise(values, 4, groups=1)
    codes, scale, zero = demote(*stored, 4, 2, 2)
    assert scale.shape == (2,) and zero[0] == 0
    np.testing.assert_array_equal(
        fake_demote(values, 4, 1, 2, 2), fake_quantise(fake_quantise(values, 4), 2, 2)
    )


def test_demoted_differs_from_quantised_directly():
    values = np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32)
    assert (fake_demote(values, 8, 1, 4, 1) != fake_quantise(values, 4)).any()


def test_without_the_zero_the_values_are_wrong():
    values = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32) + 3
    codes, scale, zero = quantise(values, 8)
    assert np.abs(dequantise(codes, scale, zero) - values).max() < 0.02
    assert np.abs(dequantise(codes, scale, np.zeros_like(zero)) - values).min() > 0.1


def test_planes_by_hand():
    # 4 bits, 4 channels: rows 0, 1 hold channels (0, 2) and (1, 3), the lower channel in the lower
    # half
    assert pack(np.array([[1], [2], [3], [15]], np.uint8), 4).tolist() == [[0x31], [0xF2]]
    # 2 bits, 4 channels: one row, channel i at bits 2i: 3 + 1 * 4 + 0 * 16 + 2 * 64
    assert pack(np.array([[3], [1], [0], [2]], np.uint8), 2).tolist() == [[135]]
    # 1 bit, 8 channels: channels 0, 3 and 7
    assert pack(np.array([[1], [0], [0], [1], [0], [0], [0], [1]], np.uint8), 1).tolist() == [
        [1 + 8 + 128]
    ]


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_planes_round_trip(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (64, 7)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (64 * bits // 8, 7) and packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack(packed, bits), codes)
