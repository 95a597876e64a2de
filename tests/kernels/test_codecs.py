"""Every stored format against the NumPy quantiser: bytes, decoded values, and the products that
attention takes with them.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_oracle import codes_of, expected, ordinary, parse, same_codes, same_meta

from diffkv_jax.pallas_kernels.codecs import Block, Full, KVFormat, Normal, Uniform
from diffkv_jax.testing.quantiser import demote_nested, dequantise, pack, requantise, unpack
from diffkv_jax.testing.readback import decode_tensor, meta_rows, payload_rows

TOKENS = 24  # no multiple of anything that a kernel would like
FORMATS = (
    "K8V8",
    "K8V4",
    "K8V2",
    "K4V4",
    "K4V2",
    "K4V1",
    "K8V4:1,2",
    "K4V2:2,4",
    "K2V1:4,2",
    "full:bfloat16",
    "full:float32",
)
FORMATS += ("K4nV2n", "K4V1n")
HEAD_DIMS = (64, 96, 128, 256)
DEMOTIONS = (
    ("K8V4", "K4V2"),
    ("K8V8", "K2V1"),
    ("K8V4:1,2", "K4V2:2,4"),
    ("K8V2:4,1", "K4V1:4,1"),
    ("K8V4", "K4V4:1,2"),
    ("full", "K4V2"),
)
DEMOTIONS += (("K8V4", "K4nV2n"), ("K4nV4n", "K2nV2"))


def ordinary_tokens(head_dim: int, seed: int = 0) -> np.ndarray:
    """`ordinary` of TOKENS tokens."""
    return ordinary(TOKENS, head_dim, seed)


@cache
def compiled(fmt: KVFormat):
    """(encode, read) of a format; `read` decodes and multiplies with queries and with weights."""

    def read(block: Block, q, p, valid):
        logits = fmt.key.key_logits(q, block.k_payload, block.k_meta)
        return (
            fmt.decode(block),
            logits,
            fmt.value.value_mix(p, block.v_payload, block.v_meta, valid),
        )

    return jax.jit(fmt.encode), jax.jit(read)


def encoded(fmt: KVFormat, k: np.ndarray, v: np.ndarray) -> Block:
    """The library's bytes of `[T, head_dim]`, in NumPy."""
    return Block(*map(np.asarray, compiled(fmt)[0](jnp.asarray(k.T), jnp.asarray(v.T))))


def same_block(fmt: KVFormat, block: Block, k: np.ndarray, v: np.ndarray) -> None:
    """Payload, metadata and dtypes of a block are those of `k` and `v`."""
    for codec, x, payload, meta in (
        (fmt.key, k, block.k_payload, block.k_meta),
        (fmt.value, v, block.v_payload, block.v_meta),
    ):
        wanted_payload, wanted_meta = expected(codec, x)
        assert payload.dtype == np.uint8 and meta.dtype == np.float16
        assert payload.shape == wanted_payload.shape and meta.shape == wanted_meta.shape
        (same_meta if isinstance(codec, Normal) else np.testing.assert_array_equal)(
            meta, wanted_meta
        )
        same_codes(codec, x, payload, wanted_payload)


def close(got, wanted: np.ndarray, size: np.ndarray) -> None:
    """Equal within float32 rounding of sums whose terms have absolute values that sum to `size`."""
    assert np.all(np.abs(np.asarray(got, np.float64) - wanted) <= 3e-6 * size + 1e-30)


def same_products(fmt: KVFormat, block: Block, k: np.ndarray, v: np.ndarray, seed: int = 0) -> None:
    """decode, key_logits and value_mix of a block equal float64 products with `k`, `v [T, d]`; half
    of the tokens are not valid.
    """
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(3, k.shape[1])).astype(np.float32)
    p = rng.uniform(size=(3, len(k))).astype(np.float32)
    valid = rng.random(len(k)) < 0.5
    spoilt = [np.array(part) for part in block]
    for part, rubbish in zip(spoilt, (255, 255, np.nan, np.nan), strict=True):
        part[:, ~valid] = rubbish
    decoded, logits, mixed = compiled(fmt)[1](Block(*spoilt), q, p, valid)
    for got, wanted in zip(decoded, (k, v), strict=True):
        np.testing.assert_allclose(
            np.asarray(got).T[valid], wanted[valid], rtol=3e-7, atol=1e-6 * np.abs(wanted).max()
        )
    q, p, k, v = (x.astype(np.float64) for x in (q, p[:, valid], k[valid], v[valid]))
    # scale and zero point are applied outside the sum: the rounding goes with |scale * code| +
    # |zero|, bounded by the largest |k|
    close(
        np.asarray(logits)[:, valid],
        q @ k.T,
        3 * np.abs(q).sum(1, keepdims=True) * np.abs(k).max(1),
    )
    close(mixed, p @ v, 3 * (p @ np.abs(v).max(1, keepdims=True)))


@pytest.mark.daily(5)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", FORMATS)
def test_format_equals_the_oracle(name: str, head_dim: int):
    fmt = parse(name)
    k, v = ordinary_tokens(head_dim, 1), ordinary_tokens(head_dim, 2)
    block = encoded(fmt, k, v)
    same_block(fmt, block, k, v)
    rows = payload_rows(fmt.key, head_dim) + payload_rows(fmt.value, head_dim)
    assert fmt.token_bytes(head_dim) == rows + 2 * (meta_rows(fmt.key) + meta_rows(fmt.value))
    read = (
        decode_tensor(fmt.key, block.k_payload, block.k_meta),
        decode_tensor(fmt.value, block.v_payload, block.v_meta),
    )
    same_products(fmt, block, *read)


@pytest.mark.parametrize("name", ["K8V4", "K4V2:2,4", "K2V1:4,2", "full:bfloat16"])
def test_extreme_values(name: str):
    """Huge and tiny ranges, one outlier channel, offsets far above the range, exact float16 limits;
    all finite when decoded.
    """
    fmt = parse(name)
    x = ordinary_tokens(64)
    x[0] *= 1e3
    x[1] *= 1e-4
    x[2, 7] = 6e4
    x[3] += 1000.0
    x[4] = np.where(np.arange(64) % 2, 32752.0, -32752.0)
    x[7] = np.where(np.arange(64) % 2, 0.0, -0.0)
    x[8] = 65504.0
    block = encoded(fmt, x, x[::-1])
    same_block(fmt, block, x, x[::-1])
    k, v = (
        decode_tensor(fmt.key, block.k_payload, block.k_meta),
        decode_tensor(fmt.value, block.v_payload, block.v_meta),
    )
    assert np.isfinite(k).all() and np.isfinite(v).all()
    np.testing.assert_array_equal(
        k[8], np.full(64, 65504.0 if fmt.key != Full("bfloat16") else 65536.0)
    )
    same_products(fmt, block, k, v)


@pytest.mark.parametrize("bits, groups", [(8, 1), (4, 2), (2, 4), (1, 1)])
def test_constant_groups_have_code_zero(bits: int, groups: int):
    x = np.full((3, 64), 2.5, np.float32)
    x[1] = np.repeat(np.arange(groups), 64 // groups)
    x[2] = 0
    codec = Uniform(bits, groups)
    payload, meta = map(np.asarray, jax.jit(codec.encode)(jnp.asarray(x.T)))
    assert not payload.any() and not meta[:groups].any()
    np.testing.assert_array_equal(decode_tensor(codec, payload, meta), x)


@pytest.mark.daily(3)
@pytest.mark.parametrize("source, target", DEMOTIONS)
def test_demotion_equals_the_oracle(source: str, target: str):
    high, low = (KVFormat.parse(name) for name in (source, target))
    block = encoded(high, ordinary_tokens(64, 3), ordinary_tokens(64, 4))
    got = Block(*map(np.asarray, jax.jit(lambda block: high.demote(low, block))(block)))
    for a, b, parts, back in (
        (high.key, low.key, block[0::2], got[0::2]),
        (high.value, low.value, block[1::2], got[1::2]),
    ):
        if isinstance(a, Uniform) and isinstance(b, Uniform) and a.groups == b.groups:
            codes, scale, zero = demote_nested(*codes_of(a, *parts), a.bits, b.bits)
            np.testing.assert_array_equal(back[0], pack(codes.T, b.bits))
            np.testing.assert_array_equal(back[1], np.concatenate([scale.T, zero.T]))
        else:
            read = decode_tensor(a, *parts)
            payload, meta = expected(b, read)
            same_codes(b, read, back[0], payload)
            same_meta(back[1], meta)


@pytest.mark.parametrize("bits, lower", [(8, 4), (8, 2), (8, 1), (4, 2), (4, 1), (2, 1), (8, 8)])
def test_demotion_of_every_code(bits: int, lower: int):
    """All codes of a group that holds both extremes; it equals requantising the decoded values,
    too.
    """
    codes = np.tile(np.arange(2**bits, dtype=np.uint8), 256 // 2**bits)[None]
    scale, zero = np.array([[0.03125]], np.float16), np.array([[-2.0]], np.float16)
    source, target = Uniform(bits), Uniform(lower)
    assert source.can_demote_to(target)
    payload, meta = pack(codes.T, bits), np.concatenate([scale.T, zero.T])
    back = map(
        np.asarray,
        jax.jit(lambda payload, meta: source.demote(target, payload, meta))(payload, meta),
    )
    got = codes_of(target, *back)
    wanted = (
        (codes, scale, zero) if bits == lower else demote_nested(codes, scale, zero, bits, lower)
    )
    for one, other, direct in zip(
        got, wanted, requantise(codes, scale, zero, lower, 1), strict=True
    ):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, direct)


@pytest.mark.parametrize("source, target", [((4, 1), (8, 1)), ((8, 1), (4, 2)), ((8, 2), (4, 1))])
def test_no_integer_demotion_to_more_bits_or_other_groups(source, target):
    assert not Uniform(*source).can_demote_to(Uniform(*target))


def test_leading_axes_are_independent():
    fmt = KVFormat.parse("K4V2:2,4")
    k = np.stack([ordinary_tokens(64, s) for s in range(6)]).reshape(2, 3, TOKENS, 64)
    got = jax.jit(fmt.encode)(jnp.asarray(k.swapaxes(-1, -2)), jnp.asarray(k.swapaxes(-1, -2)))
    for index in np.ndindex(2, 3):
        same_block(fmt, Block(*(np.asarray(part)[index] for part in got)), k[index], k[index])


def interleaved(codec: Uniform | Normal, payload: np.ndarray) -> np.ndarray:
    """The payload with neighbouring channels in a byte, as other packings have it."""
    codes = unpack(payload, codec.bits)
    planes = 8 // codec.bits
    return pack(np.concatenate([codes[i::planes] for i in range(planes)]), codec.bits)


def mistakes(fmt: KVFormat, block: Block) -> dict[str, Block]:
    """Blocks with one thing wrong."""
    groups = fmt.value.groups
    no_zero, swapped_meta = np.array(block.v_meta), np.roll(block.v_meta, groups, axis=0)
    no_zero[groups:] = 0
    return {
        "K and V swapped": Block(block.v_payload, block.k_payload, block.v_meta, block.k_meta),
        "zero point dropped": block._replace(v_meta=no_zero),
        "scale and zero swapped": block._replace(v_meta=swapped_meta),
        "planes in the wrong order": block._replace(
            k_payload=interleaved(fmt.key, block.k_payload)
        ),
        "nibbles swapped": block._replace(
            k_payload=(block.k_payload << 4) | (block.k_payload >> 4)
        ),
        "one code off": block._replace(
            k_payload=block.k_payload
            ^ (np.arange(block.k_payload.size) == 40).reshape(block.k_payload.shape)
        ),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "K and V swapped",
        "zero point dropped",
        "scale and zero swapped",
        "planes in the wrong order",
        "nibbles swapped",
        "one code off",
    ],
)
def test_the_comparison_sees_mistakes(kind: str):
    fmt = KVFormat.parse("K4V4")
    k, v = ordinary_tokens(64, 7), ordinary_tokens(64, 8)
    good = encoded(fmt, k, v)
    same_block(fmt, good, k, v)
    bad = mistakes(fmt, good)[kind]
    with pytest.raises(AssertionError):
        same_block(fmt, bad, k, v)
    if kind == "one code off":
        return  # may fall on a token that the product test leaves out
    read = [
        dequantise(*codes_of(fmt.key, *good[0::2])),
        dequantise(*codes_of(fmt.value, *good[1::2])),
    ]
    with pytest.raises(AssertionError):
        same_products(fmt, bad, *read)


def test_the_comparison_sees_mistakes_of_levels():
    """A sign, a neighbouring level, planes in the wrong order, the scale without the levels'
    norm.
    """
    codec, x = Normal(4), ordinary_tokens(64, 7)
    payload, meta = expected(codec, x)
    for wrong in (
        payload ^ 8,
        payload ^ 1,
        (payload << 4) | (payload >> 4),
        interleaved(codec, payload),
    ):
        with pytest.raises(AssertionError):
            same_codes(codec, x, wrong, payload)
    with pytest.raises(AssertionError):
        same_meta((np.linalg.norm(x, axis=1)[None] / 8).astype(np.float16), meta)
