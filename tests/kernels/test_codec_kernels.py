"""`encode` and `demote` of every implementation against the NumPy quantiser, byte by byte."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_oracle import codes_of, expected, of_any_size, ordinary, parse, same_codes, same_meta
from implementations import IMPLEMENTATIONS, LONG, marked

from diffkv_jax.pallas_kernels import codecs
from diffkv_jax.pallas_kernels.codecs import Block, KVFormat, Uniform, mosaic_tpu, triton
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.testing.quantiser import demote_nested, pack
from diffkv_jax.testing.readback import decode_tensor

COUNT = 3  # blocks
EACH = marked(IMPLEMENTATIONS, mosaic_tpu_checked=LONG)
EVERY_FORMAT = (
    "K1V1:1,2",
    "K1V2:4,1",
    "K2V2:2,4",
    "K4V4:1,2",
    "K4V8:4,1",
    "K8V8:2,4",
    "full:bfloat16",
    "full:float32",
    "full:float16",
)
EVERY_FORMAT += ("K4nV2n", "K1nV8")
DEMOTIONS = (
    ("K8V4", "K4V2"),
    ("K8V8:4,2", "K2V1:4,2"),
    ("K8V4:1,2", "K4V2:2,4"),
    ("K4V4", "K4V2"),
    ("full:bfloat16", "K8V4"),
    ("full:float32", "K4V2:2,4"),
    ("full:float16", "K1V8:1,4"),
)
# sums of squares, whose rounding depends on their order
TO_LEVELS = (("K8V4", "K4nV2n"), ("K4nV4n", "K2nV2"))


def values(tokens: int, head_dim: int, seed: int, of=ordinary) -> np.ndarray:
    """float32 [COUNT, T, d]."""
    return of(COUNT * tokens, head_dim, seed).reshape(COUNT, tokens, head_dim)


def same_blocks(fmt: KVFormat, got: Block, k: np.ndarray, v: np.ndarray) -> None:
    """Blocks `[N, rows, T]` are those of `k` and `v [N, T, d]`."""
    for codec, x, payload, meta in ((fmt.key, k, *got[0::2]), (fmt.value, v, *got[1::2])):
        payload, meta = np.asarray(payload), np.asarray(meta)
        assert len(payload) == len(meta) == len(x)
        for i in range(len(x)):
            wanted_payload, wanted_meta = expected(codec, x[i])
            assert payload[i].dtype == np.uint8 and payload[i].shape == wanted_payload.shape
            same_codes(codec, x[i], payload[i], wanted_payload)
            same_meta(meta[i], wanted_meta)


def check_encode(
    kernels: Kernels, name: str, tokens: int, head_dim: int, dtype="float32", of=ordinary
) -> None:
    """Encode values of a dtype and compare."""
    fmt = parse(name)
    k, v = (values(tokens, head_dim, seed, of).astype(jnp.dtype(dtype)) for seed in (1, 2))
    got = jax.jit(lambda k, v: codecs.encode(fmt, k, v, kernels=kernels))(
        k.swapaxes(1, 2), v.swapaxes(1, 2)
    )
    same_blocks(fmt, got, k.astype(np.float32), v.astype(np.float32))


@pytest.mark.daily(7)
@pytest.mark.parametrize("kernels", EACH)
@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_encode_every_codec(kernels: Kernels, name: str):
    check_encode(kernels, name, 32, 64)


@pytest.mark.daily(3)
@pytest.mark.parametrize("kernels", EACH)
@pytest.mark.parametrize("tokens, head_dim, dtype", [(64, 256, "bfloat16"), (128, 128, "float16")])
def test_encode_other_shapes_and_dtypes(kernels: Kernels, tokens: int, head_dim: int, dtype: str):
    check_encode(kernels, "K8V4", tokens, head_dim, dtype)


@pytest.mark.daily(3)
@pytest.mark.parametrize("kernels", EACH)
@pytest.mark.parametrize("name", ["K8V4:1,2", "K1V2:4,1", "K4nV2n"])
def test_encode_numbers_of_any_size(kernels: Kernels, name: str):
    check_encode(kernels, name, 32, 64, of=of_any_size)


def encoded(fmt: KVFormat, k: np.ndarray, v: np.ndarray) -> Block:
    """The oracle's blocks of `[N, T, d]`."""
    parts = [[expected(codec, one) for one in x] for codec, x in ((fmt.key, k), (fmt.value, v))]
    (k_payload, k_meta), (v_payload, v_meta) = (
        [np.stack(part) for part in zip(*side, strict=True)] for side in parts
    )
    return Block(k_payload, v_payload, k_meta, v_meta)


def check_demotion(
    kernels: Kernels, source: str, target: str, tokens: int, head_dim: int, of=ordinary
) -> None:
    """Demote the oracle's blocks and compare with its own demotion."""
    high, low = parse(source), parse(target)
    block = encoded(high, values(tokens, head_dim, 3, of), values(tokens, head_dim, 4, of))
    got = jax.tree.map(
        np.asarray,
        jax.jit(lambda block: codecs.demote(high, low, block, kernels=kernels))(block),
    )
    for a, b, parts, back in (
        (high.key, low.key, block[0::2], got[0::2]),
        (high.value, low.value, block[1::2], got[1::2]),
    ):
        for i in range(COUNT):
            same_demotion(a, b, [part[i] for part in parts], [part[i] for part in back])


def same_demotion(a, b, old: list[np.ndarray], new: list[np.ndarray]) -> None:
    """One tensor of one block: nested demotion exactly, the way through the values as near as
    `same_codes` asks.
    """
    if (
        isinstance(a, Uniform)
        and isinstance(b, Uniform)
        and a.groups == b.groups
        and a.bits >= b.bits
    ):
        codes = codes_of(a, *old)
        codes, scale, zero = codes if a.bits == b.bits else demote_nested(*codes, a.bits, b.bits)
        np.testing.assert_array_equal(new[0], pack(codes.T, b.bits))
        np.testing.assert_array_equal(new[1], np.concatenate([scale.T, zero.T]))
    else:
        read = decode_tensor(a, *old)
        payload, meta = expected(b, read)
        same_codes(b, read, new[0], payload)
        same_meta(new[1], meta)


@pytest.mark.daily(7)
@pytest.mark.parametrize("kernels", EACH)
@pytest.mark.parametrize("source, target", DEMOTIONS + TO_LEVELS)
def test_demote(kernels: Kernels, source: str, target: str):
    check_demotion(kernels, source, target, 32, 64)


@pytest.mark.daily(3)
@pytest.mark.parametrize("kernels", EACH)
@pytest.mark.parametrize("tokens, head_dim", [(64, 256), (128, 128)])
def test_demote_other_shapes(kernels: Kernels, tokens: int, head_dim: int):
    check_demotion(kernels, "K8V4", "K4V2", tokens, head_dim)


@pytest.mark.daily(3)
@pytest.mark.parametrize("kernels", EACH)
@pytest.mark.parametrize(
    "source, target", [("K8V8:1,2", "K4V2:1,2"), ("full:float32", "K4V4"), ("K8V4", "K4nV2:1,2")]
)
def test_demote_numbers_of_any_size(kernels: Kernels, source: str, target: str):
    check_demotion(kernels, source, target, 32, 64, of_any_size)


NATIVE = [p for p in IMPLEMENTATIONS if p.id == "cpu"]


def hard_values() -> np.ndarray:
    """float32 [COUNT, T, d] on a coarse grid, where many codes lie half-way; some tokens are
    constant, huge or infinite.
    """
    x = values(32, 64, 9).astype(jnp.bfloat16).astype(np.float32)
    x[0, 1], x[0, 3, 5], x[1, 4] = 2.5, np.inf, 1e38 * np.sign(x[1, 4])
    x[1, 5], x[2, 6] = x[1, 5] * 1e-8, x[2, 6] * 1e5
    return x


@pytest.mark.daily(3)
@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize(
    "source, target", [*DEMOTIONS, ("K2V1:2,4", "full:bfloat16"), ("K4V2", "K8V8")]
)
def test_native_kernels_round_as_xla_does(kernels: Kernels, source: str, target: str):
    high, low, x = parse(source), parse(target), hard_values().swapaxes(1, 2)
    wanted = jax.jit(high.encode)(x, x)
    got = jax.jit(lambda x: codecs.encode(high, x, x, kernels=kernels))(x)
    sane = finite(high, wanted)
    same_tokens(got, wanted, sane)
    lower = jax.jit(lambda block: codecs.demote(high, low, block, kernels=kernels))(wanted)
    same_tokens(lower, jax.jit(lambda block: high.demote(low, block))(wanted), sane)


def finite(fmt: KVFormat, block: Block) -> np.ndarray:
    """Tokens `[N, T]` all of whose values are finite as they are read back."""
    return np.all([np.isfinite(x).all(axis=1) for x in fmt.decode(block)], axis=0)


def same_tokens(got: Block, wanted: Block, which: np.ndarray) -> None:
    """The same bytes of the tokens `which [N, T]`."""
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(
            np.asarray(one).swapaxes(1, 2)[which], np.asarray(other).swapaxes(1, 2)[which]
        )


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_native_kernels_show_what_is_no_number(kernels: Kernels, wrong: float):
    """A group that holds one reads back as none."""
    fmt, x = KVFormat.parse("K8V4"), values(32, 64, 9).swapaxes(1, 2)
    x[1, 7, 3] = wrong
    read = fmt.decode(codecs.encode(fmt, jnp.asarray(x), jnp.asarray(x), kernels=kernels))
    for one in read:
        numbers = np.isfinite(one)
        assert not numbers[1, :, 3].any() and numbers[[0, 2]].all() and numbers[1].sum() == 31 * 64


@pytest.mark.parametrize("kernels", NATIVE)
def test_native_kernels_refuse_blocks_of_odd_size(kernels: Kernels):
    x = jnp.zeros((1, 64, 24))
    with pytest.raises(ValueError, match="24 must be a multiple of 16.*implementation='xla'"):
        codecs.encode(KVFormat.parse("K8V4"), x, x, kernels=kernels)


@pytest.mark.slow
def test_other_block_sizes():
    """Several pieces of a block on GPUs; on TPUs a last step that is not full."""
    fmt, lower = KVFormat.parse("K8V4"), KVFormat.parse("K4V2")
    k, v = values(32, 64, 5), values(32, 64, 6)
    turned = k.swapaxes(1, 2), v.swapaxes(1, 2)
    block = encoded(fmt, k, v)
    wanted = jax.tree.map(np.asarray, jax.jit(lambda block: fmt.demote(lower, block))(block))
    for module, blocks in ((triton, triton.Blocks(16, 1)), (mosaic_tpu, mosaic_tpu.Blocks(2))):
        encode = jax.jit(partial(module.encode, fmt, interpret=True, blocks=blocks))
        same_blocks(fmt, encode(*turned), k, v)
        got = jax.jit(partial(module.demote, fmt, lower, interpret=True, blocks=blocks))(block)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_triton_refuses_what_is_no_power_of_two():
    fmt = KVFormat.parse("K8V4")
    for tokens, head_dim, message in (
        (24, 64, "tokens a block=24"),
        (32, 96, "channels of a tile="),
    ):
        x = jnp.zeros((1, head_dim, tokens))
        with pytest.raises(ValueError, match=f"{message}.*power of two.*implementation='xla'"):
            triton.encode(fmt, x, x, interpret=True)
        block = jax.eval_shape(fmt.encode, x, x)
        with pytest.raises(ValueError, match=f"{message}.*power of two.*implementation='xla'"):
            triton.demote(fmt, KVFormat.parse("K4V2"), block, interpret=True)


@pytest.mark.parametrize(
    "kind",
    [
        "planes swapped",
        "zero point dropped",
        "blocks swapped",
        "one block left out",
        "K and V swapped",
    ],
)
def test_the_comparison_sees_mistakes(kind: str):
    fmt = KVFormat.parse("K4V4:1,1")
    k, v = values(32, 64, 7), values(32, 64, 8)
    good = encoded(fmt, k, v)
    same_blocks(fmt, good, k, v)
    no_zero, left_out = good.v_meta.copy(), good.v_payload.copy()
    no_zero[:, fmt.value.groups :] = 0
    left_out[-1] = 0
    wrong = {
        "planes swapped": good._replace(k_payload=(good.k_payload << 4) | (good.k_payload >> 4)),
        "zero point dropped": good._replace(v_meta=no_zero),
        "blocks swapped": Block(*(part[::-1] for part in good)),
        "one block left out": good._replace(v_payload=left_out),
        "K and V swapped": Block(good.v_payload, good.k_payload, good.v_meta, good.k_meta),
    }[kind]
    with pytest.raises(AssertionError):
        same_blocks(fmt, wrong, k, v)
