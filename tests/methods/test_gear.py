"""GEAR on blocks and on cached pages: its equations in NumPy, how near the best the low rank is,
and the bits it takes.
"""

import jax
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.make_cache import make_cache
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.codecs.low_rank import nearest
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout
from diffkv_jax.read_prompts import prefill
from diffkv_jax.testing.blocks import gear, gear_low_rank, kivi_keys
from diffkv_jax.testing.quantiser import fake_quantise
from diffkv_jax.testing.readback import check_pool, held_tokens
from diffkv_jax.testing.tiny import tiny_model

LENGTH, HEAD_DIM, GROUP = 150, 32, 32
TOKENS = np.random.default_rng(5).integers(0, 97, (1, LENGTH))
RNG = np.random.default_rng(3)


def per_token(groups: int, bits: int):
    """The quantiser of docs/design.md of tokens that are columns."""
    return lambda x: np.swapaxes(fake_quantise(np.swapaxes(x, -1, -2), bits, groups), -1, -2)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_low_rank_is_near_the_best(rank):
    """Of what quantisation to two bits gets wrong: within ten percent of the best of its rank,
    which the SVD gives.
    """
    x = RNG.normal(size=(6, 64, 64)) * RNG.uniform(0.2, 3, (6, 64, 1))
    error = np.swapaxes(x - kivi_keys(x.astype(np.float32), 2), -1, -2).astype(np.float32)
    q, p = map(np.asarray, jax.jit(nearest, static_argnums=1)(error, rank))
    left = np.linalg.norm(error - q @ np.swapaxes(p, -1, -2), axis=(-2, -1))
    singular = np.linalg.svd(error, compute_uv=False)
    best = np.sqrt(np.square(singular[:, rank:]).sum(axis=1))
    assert np.all(left <= 1.1 * best) and np.all(left >= 0.999 * best)
    assert np.all(left < 0.985 * np.linalg.norm(error, axis=(-2, -1)))  # and it is something


def test_a_low_rank_is_found():
    """A matrix of three ranks is met by three, not by two."""
    error = (RNG.normal(size=(64, 3)) @ RNG.normal(size=(3, 48))).astype(np.float32)
    for rank, least, most in ((2, 0.05, 1.0), (3, 0.0, 1e-4)):
        q, p = map(np.asarray, nearest(error, rank))
        assert least <= np.linalg.norm(error - q @ p.T) / np.linalg.norm(error) <= most


@pytest.mark.daily(3)
@pytest.mark.parametrize("name", ["K2cV2g32+o5+r2", "K2cV2+r3", "K4cV4+o10+r4"])
def test_blocks_are_gear(name):
    """Decoded as attention reads them, three blocks side by side; channels have a bias, as keys
    have.
    """
    x = (RNG.normal(size=(3, 64, 32)) + 3 * RNG.normal(size=(64, 1))).astype(np.float32)
    fmt = KVFormat.parse(name).for_block(64, 32)
    rank, count = (
        int(name[-1]),
        {"o5": (2, 4), "o1": (4, 6), "": (0, 0)}[
            name[name.find("+o") + 1 :][:2] if "+o" in name else ""
        ],
    )
    bits, groups = int(name[1]), 2 if "g32" in name else 1
    for codec, inner, axis, outliers in (
        (fmt.key, lambda x: kivi_keys(x, bits), -1, count[0]),
        (fmt.value, per_token(groups, bits), -2, count[1]),
    ):
        payload, meta = map(np.asarray, jax.jit(codec.encode)(x))
        merged = (np.moveaxis(part, 0, 1).reshape(part.shape[1], -1) for part in (payload, meta))
        decoded = np.asarray(jax.jit(codec.decode)(*merged))
        found = np.moveaxis(decoded.reshape(64, 3, 32), 1, 0)
        np.testing.assert_allclose(found, gear(x, inner, outliers, axis, rank), atol=3e-3)
        without = gear(x, inner, outliers, axis, 0)
        assert np.abs(found - without).max() > 0.05
        assert np.square(found - x).mean() < 0.98 * np.square(without - x).mean()


def test_what_learned_codecs_get_wrong():
    """A learned codec beneath: it gets its table, and what is left is the error without the low
    rank's part of it.
    """
    x = RNG.normal(size=(2, 3, 64, 32)).astype(np.float32)
    levels = jax.numpy.sort(jax.numpy.asarray(RNG.uniform(-1, 1, (2, 4)), "float16"), axis=1)
    plain, ranked = (
        KVFormat.parse(name).for_block(64, 32).value for name in ("K2sV2t+o5", "K2sV2t+o5+r4")
    )
    assert ranked.table_shape(64) == plain.table_shape(64) == (4,)
    bound = [codec.with_table(levels) for codec in (plain, ranked)]
    without, found = map(
        np.asarray, jax.jit(lambda x: [codec.decode(*codec.encode(x)) for codec in bound])(x)
    )
    error = x - without
    wanted = (
        x
        - error
        + np.swapaxes(gear_low_rank(np.swapaxes(error, -1, -2).astype(np.float64), 4), -1, -2)
    )
    np.testing.assert_allclose(found, wanted, atol=3e-3)
    assert np.abs(found - without).max() > 0.05


@pytest.mark.daily(2)
@pytest.mark.parametrize(("backbone", "groups"), [("kivi", HEAD_DIM // GROUP), ("kcvt", 1)])
def test_pages_hold_gear(backbone, groups):
    """A prompt of one chunk is attended exactly, so the exact keys and values are those of the
    plain cache in every layer.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=HEAD_DIM)
    policy = dkv.gear(2, rank=2, outliers=0.1, group=GROUP, buffer=48, backbone=backbone)
    caches = []
    for one in (policy, dkv.CompressionPolicy.none(window=16)):
        cache = make_cache(model, one, [LENGTH + 1], kernels=Kernels("xla"))
        caches.append(prefill(model, params, cache, TOKENS, np.array([LENGTH]), 256)[1])
    found, plain = caches
    check_pool(found.spec.layout, found.stored.page_table, found.stored.tier_len, found.stored.ring)
    for layer in range(2):
        held, exact = held_tokens(found, layer, 0, 1), held_tokens(plain, layer, 0, 1)
        assert (
            sorted(held) == list(range(LENGTH))
            and sum(tier != "recent" for tier, *_ in held.values()) == 128
        )
        for i, inner, axis in ((1, lambda x: kivi_keys(x, 2), -1), (2, per_token(groups, 2), -2)):
            for first in range(0, 128, GROUP):
                x = np.stack([exact[at][i] for at in range(first, first + GROUP)]).T
                wanted = gear(x, inner, 4, axis, 2)
                np.testing.assert_allclose(
                    np.stack([held[at][i] for at in range(first, first + GROUP)]).T,
                    wanted,
                    atol=3e-3,
                )
                assert np.abs(wanted - gear(x, inner, 4, axis, 1)).max() > 0.01


@pytest.mark.parametrize(
    ("bits", "group", "rank", "outliers", "backbone"),
    [
        (2, 64, 2, 0.02, "kivi"),
        (2, 128, 4, 0.02, "kivi"),
        (4, 64, 2, 0.02, "kcvt"),
        (2, 64, 4, 0, "kivi"),
    ],
)
def test_bits_are_those_of_the_formula(bits, group, rank, outliers, backbone):
    """b + 32 / g + 16 r (T + d) / (T d) + s (16 + 8): g is T for keys; a byte an index; s is a
    whole number a vector.
    """
    policy, d = (
        dkv.gear(bits, rank=rank, outliers=outliers, group=group, buffer=group, backbone=backbone),
        128,
    )
    layout = PageLayout.solve(policy.formats("bfloat16"), d, tokens=policy.group, scored=False)
    scales = 32 / group + 32 / (group if backbone == "kivi" else d)
    shares = [2 * max(1, round(outliers * n / 2)) / n if outliers else 0 for n in (group, d)]
    wanted = 2 * bits + scales + 2 * 16 * rank * (group + d) / (group * d) + 24 * sum(shares)
    assert layout.formats[0].token_bytes(d) * 8 / d == pytest.approx(wanted)
    assert layout.tokens_per_group == group


@pytest.mark.slow
def test_gear_goes_on_in_decode():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=HEAD_DIM)
    policy = dkv.gear(4, group=GROUP, buffer=GROUP)
    out = dkv.generate(model, params, TOKENS[:, :100], policy=policy, max_new_tokens=71)
    assert (
        out.finish_reason == ("length",)
        and out.cache.stored.tier_len.ravel().tolist() == [160] * 4
        and int(out.cache.counters.recent_len[0]) == 10
    )
    check_pool(
        out.cache.spec.layout,
        out.cache.stored.page_table,
        out.cache.stored.tier_len,
        out.cache.stored.ring,
    )


@pytest.mark.daily(3)
@pytest.mark.parametrize("head_dim", [80, 100, 112])
def test_head_dims_that_the_group_does_not_divide(head_dim):
    """Values in groups of the nearest divisor, everything else as with other widths; a given
    `value_group` must divide.
    """
    fmt = dkv.gear(2).formats("float32")[0]
    groups = {80: 2, 100: 2, 112: 2}[head_dim]  # of 40, 50 and 56 channels
    codec = fmt.for_block(head_dim, 64).value
    assert (
        dkv.gear(2, value_group=20).formats("float32")[0].for_block(80, 64).value.codec.codec.groups
        == 4
    )
    x = RNG.normal(size=(2, head_dim, 64)).astype(np.float32)
    payload, meta = map(np.asarray, jax.jit(codec.encode)(x))
    merged = (np.moveaxis(part, 0, 1).reshape(part.shape[1], -1) for part in (payload, meta))
    found = np.moveaxis(np.asarray(jax.jit(codec.decode)(*merged)).reshape(head_dim, 2, 64), 1, 0)
    np.testing.assert_allclose(found, gear(x, per_token(groups, 2), 2, -2, 2), atol=3e-3)
    with pytest.raises(
        ValueError, match=f"head_dim={head_dim} must be a multiple of the groups' channels=48"
    ):
        dkv.gear(2, value_group=48).formats("float32")[0].for_block(head_dim, 64)


def test_bad_input():
    for wrong, message in (
        ({"backbone": "uniform"}, "backbone='uniform' must be"),
        ({"buffer": 32}, "buffer=32 must be at least group=64"),
        ({"outliers": 1.0}, "share=1.0"),
        ({"bits": 3}, "bits=3"),
        ({"backbone": "kcvt", "value_group": 16}, "value_group=16 belongs to backbone='kivi'"),
    ):
        with pytest.raises(ValueError, match=message):
            dkv.gear(**wrong)
    with pytest.raises(ValueError, match="rank=40 must be at least 1 and at most"):
        KVFormat.parse("K4cV4+r40").for_block(64, 32)
    assert (
        dkv.CompressionPolicy.from_json(dkv.gear().to_json())
        == dkv.gear()
        == dkv.load_policy("gear")
    )
