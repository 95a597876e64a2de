"""Codecs whose numbers belong to a block of tokens, and outliers kept apart: rows and decoded
values against plain NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.pallas_kernels.codecs import (
    Full,
    KVFormat,
    Outliers,
    PerChannel,
    Uniform,
)
from diffkv_jax.testing.blocks import kivi_keys, with_outliers
from diffkv_jax.testing.quantiser import fake_quantise

HEAD_DIM, TOKENS, BLOCKS = 48, 32, 3
RNG = np.random.default_rng(4)
# channels with a bias
X = (RNG.normal(size=(2, BLOCKS, HEAD_DIM, TOKENS)) + RNG.normal(size=(HEAD_DIM, 1)) * 3).astype(
    np.float32
)


def stored(codec, x):
    """What a codec gives back of blocks `[..., n, d, T]`, read as attention does: the n blocks side
    by side.
    """
    codec = codec.for_block(*x.shape[-2:])
    payload, meta = jax.jit(codec.encode)(x)
    assert payload.dtype == np.uint8 and meta.dtype == np.float16
    assert payload.shape[-2:] == (codec.rows(x.shape[-2]), x.shape[-1]) and meta.shape[-2:] == (
        codec.meta_rows,
        x.shape[-1],
    )
    side_by_side = x.shape[-3] * x.shape[-1]
    merged = (
        np.moveaxis(part, -3, -2).reshape(*part.shape[:-3], part.shape[-2], side_by_side)
        for part in map(np.asarray, (payload, meta))
    )
    decoded = np.asarray(jax.jit(codec.decode)(*merged))
    return np.moveaxis(decoded.reshape(*decoded.shape[:-1], x.shape[-3], -1), -2, -3)


def per_token(x, bits):
    """The quantiser of docs/design.md of tokens that are columns."""
    return np.swapaxes(fake_quantise(np.swapaxes(x, -1, -2), bits), -1, -2)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_per_channel_is_kivi(bits):
    found, wanted = stored(KVFormat.parse(f"K{bits}cV4").key, X), kivi_keys(X, bits)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert np.abs(found - per_token(X, bits)).max() > 0.01  # another axis is another codec


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("fill", ["mean", "median"])
def test_outliers_are_kept_exactly(axis, fill):
    codec = Outliers(PerChannel(4) if axis == "channel" else Uniform(4), 0.1, axis, fill)
    inner = (lambda x: kivi_keys(x, 4)) if axis == "channel" else (lambda x: per_token(x, 4))
    # ten percent of 48 and of 32, rounded to pairs
    count, along = 4, -1 if axis == "channel" else -2
    wanted, kept = with_outliers(X, inner, count, along, fill)
    found = stored(codec, X)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert kept.sum() == count * X.size / X.shape[along]
    np.testing.assert_array_equal(found[kept], X[kept].astype(np.float16))
    # the others gain by it
    assert np.abs(found - X)[~kept].mean() < 0.8 * np.abs(inner(X) - X)[~kept].mean()
    # what took their places, which a range does not show: the inner codec's rows come first
    exact = Outliers(Full("float32"), 0.1, axis, fill).for_block(HEAD_DIM, TOKENS)
    filled = Full("float32").decode(jax.jit(exact.encode)(X)[0][..., : 4 * HEAD_DIM, :], None)
    middle = (np.mean if fill == "mean" else np.median)(X, axis=along, keepdims=True)
    np.testing.assert_allclose(filled, np.where(kept, middle, X), rtol=1e-5, atol=1e-6)


def test_equal_values_are_no_trouble():
    x = np.full((1, 1, HEAD_DIM, TOKENS), 2.5, np.float32)
    for name in ("K2cV2+o5", "K2V2+o5"):
        np.testing.assert_array_equal(stored(KVFormat.parse(name).key, x), x)


@pytest.mark.slow
def test_separable_is_what_it_says():
    """Encoding a token alone gives what encoding it among others gives, if and only if the codec is
    separable.
    """
    rng = np.random.default_rng(0)
    for name in (
        "K4V4",
        "K4cV4",
        "K4V4+o5",
        "K4cV4+o5",
        "K4g16V4",
        "K4nV4n",
        "K4V4+r2",
        "K4v4V4v4",
        "K4sV4s",
        "K4tV4t",
        "K4tV4t+o5",
    ):
        codec = KVFormat.parse(name).key
        if (shape := codec.for_block(HEAD_DIM, TOKENS).table_shape(HEAD_DIM)) is not None:
            table = np.sort(rng.uniform(-1, 1, (2, *shape)), axis=-1 if len(shape) == 1 else -2)
            codec = codec.with_table(jnp.asarray(table, jnp.float16))
        among, alone = (
            stored(codec, X)[..., 5:6],
            stored(codec, np.repeat(X[..., 5:6], TOKENS, axis=-1))[..., 5:6],
        )
        assert codec.separable == np.array_equal(among, alone), name
        assert KVFormat.parse(name).separable == codec.separable


def test_names():
    for name in ("K2cV2:1,2", "K2cV2g32+o2", "K4cV4+o0.5", "K8V4", "full"):
        assert KVFormat.parse(name).name == name
        assert KVFormat.parse(KVFormat.parse(name).for_block(64, 32).name) == KVFormat.parse(name)
    assert KVFormat.parse("K2cV2g16").for_block(48, 32).value == Uniform(2, 3)
    assert KVFormat.parse("K2cV2g64").for_block(48, 32).value == Uniform(2, 1)
    assert KVFormat.parse("K4V4+o2").for_block(64, 32).token_bytes(64) == 2 * (32 + 2 + 2 * (2 + 2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("K2xV2", "letter behind the bits of"),
        ("K2c3V2", "takes no number"),
        ("K2gV2", "needs a number"),
        ("K2cV2:2,2", "no groups a token"),
        ("K3cV2", "bits=3"),
        ("K2cV2+o100", "share=1.0 of outliers"),
        ("K2cV2+q3", "outliers in percent"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message):
        KVFormat.parse(name)


def test_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="longer than 256"):
        KVFormat.parse("K4V4+o2").for_block(512, 32)
    with pytest.raises(ValueError, match="multiple of the groups' channels=32"):
        KVFormat.parse("K4g32V4").for_block(48, 32)
