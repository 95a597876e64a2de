"""Plain NumPy reference of the quantiser, the demotions and the plane packing (docs/design.md,
section 1).

Written from the equations alone; it shares no code with the library. Values are `[..., head_dim]`:
the last axis holds the channels of one token of one head, and a group is `head_dim / groups`
contiguous channels.
"""

import numpy as np

from diffkv_jax.testing import stored_numbers as stored


def quantise(values, bits, groups=1):
    """Codes uint8 `[..., head_dim]`, scale and zero as stored `[..., groups]`; the codes come from
    the unrounded scale and zero.
    """
    values = np.asarray(values, np.float32)
    grouped = values.reshape(*values.shape[:-1], groups, values.shape[-1] // groups)
    scale, zero, *kept = stored.grid(
        grouped.min(axis=-1, keepdims=True), grouped.max(axis=-1, keepdims=True), 2**bits - 1
    )
    with np.errstate(over="ignore"):
        # a constant group has codes 0
        ratio = np.divide(grouped - zero, scale, out=np.zeros_like(grouped), where=scale > 0)
    # np.rint rounds halves to even
    codes = np.clip(np.rint(ratio), 0, 2**bits - 1).astype(np.uint8)
    return codes.reshape(values.shape), *(x[..., 0] for x in kept)


def dequantise(codes, scale, zero):
    """`scale * code + zero` in float32 from the stored numbers."""
    grouped = codes.reshape(
        *codes.shape[:-1], scale.shape[-1], codes.shape[-1] // scale.shape[-1]
    ).astype(np.float32)
    return (
        stored.read_scale(scale)[..., None] * grouped + stored.read_zero(scale, zero)[..., None]
    ).reshape(codes.shape)


def fake_quantise(values, bits, groups=1):
    """What a reader of the stored form sees."""
    return dequantise(*quantise(values, bits, groups))


def requantise(codes, scale, zero, bits, groups):
    """Demotion by way of the values: dequantise, then quantise to `bits` in `groups` groups."""
    return quantise(dequantise(codes, scale, zero), bits, groups)


def step_ratio(bits_from, bits_to):
    """Fine steps in one coarse step: 17 for 8 to 4, 5 for 4 to 2, 85 for 8 to 2; always odd, so
    that rounding meets no ties.
    """
    ratio, remainder = divmod(2**bits_from - 1, 2**bits_to - 1)
    assert remainder == 0 and ratio % 2 == 1
    return ratio


def demote_nested(codes, scale, zero, bits_from, bits_to):
    """Demotion on integers only; both forms have the same groups, and the zero is unchanged, but
    for its rounding where only the new scale is beyond float16.
    """
    ratio = step_ratio(bits_from, bits_to)
    coarse = (codes.astype(np.int32) + ratio // 2) // ratio
    larger = np.float32(ratio) * stored.read_scale(scale)
    wide = stored.is_wide(scale) | stored.too_large(larger)
    return (
        coarse.astype(np.uint8),
        stored.marked(larger, wide),
        stored.beside(stored.read_zero(scale, zero), wide),
    )


def demote(codes, scale, zero, bits_from, bits_to, groups_to):
    """Nested where the number of groups stays, by way of the values otherwise."""
    if scale.shape[-1] == groups_to:
        return demote_nested(codes, scale, zero, bits_from, bits_to)
    return requantise(codes, scale, zero, bits_to, groups_to)


def fake_demote(values, bits_from, groups_from, bits_to, groups_to):
    """What a reader sees of a token that was stored in the first form and then demoted to the
    second.
    """
    codes, scale, zero = quantise(values, bits_from, groups_from)
    return dequantise(*demote(codes, scale, zero, bits_from, bits_to, groups_to))


def pack(codes, bits):
    """Plane packing of codes `[channels, tokens]` into bytes `[channels * bits / 8, tokens]`.

    Byte row r holds channels r, r + rows, r + 2 rows, ...; the first of them in the lowest bits.
    """
    channels, tokens = codes.shape
    planes = 8 // bits
    rows = channels // planes
    packed = np.zeros((rows, tokens), np.uint8)
    for row in range(rows):
        for plane in range(planes):
            packed[row] |= codes[row + plane * rows] << np.uint8(plane * bits)
    return packed


def unpack(packed, bits):
    """The inverse of `pack`."""
    rows, tokens = packed.shape
    planes = 8 // bits
    codes = np.zeros((rows * planes, tokens), np.uint8)
    for row in range(rows):
        for plane in range(planes):
            codes[row + plane * rows] = (packed[row] >> np.uint8(plane * bits)) & np.uint8(
                2**bits - 1
            )
    return codes
