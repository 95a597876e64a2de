"""KVQuant (arXiv:2401.18079): learned levels, static ranges of channels, dynamic ranges of tokens,
outliers apart; and with CQ keys.
"""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.cache.layer import layer_heads, layer_layout
from diffkv_jax.calibration.kmeans import weighted_kmeans
from diffkv_jax.pallas_kernels.codecs import (
    Fitting,
    KVFormat,
    Levels,
    LowRank,
    Outliers,
    StaticLevels,
)
from diffkv_jax.pallas_kernels.decode_attention import decode_attention
from diffkv_jax.testing.quantiser import fake_quantise, pack
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import tiny_model

TOKENS = np.random.default_rng(3).integers(0, 97, (2, 90))
FREQUENCIES = 10000.0 ** (-np.arange(16) / 16)
HOW = Fitting(partial(weighted_kmeans, iterations=30), q_norm=False)
POLICIES = {
    "kvquant": dkv.kvquant(3, window=16, flush=8),
    "CQ keys": dkv.CompressionPolicy(
        "CQ keys",
        tiers=("K8v4V4t+o1",),
        schedule=dkv.Schedule(window=16, flush=8),
        transform=dkv.WithoutRope(),
    ),
}


def half(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(np.float16).astype(np.float32)


def token_levels(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """`x [n, d]` coded by the levels of each token's range, and decoded (sec. 3.3 and 3.2: per
    token for values).
    """
    high, low = x.max(axis=1, keepdims=True), x.min(axis=1, keepdims=True)
    span, middle = half((high - low) / 2), half((high + low) / 2)
    scaled = (x - middle) / np.where(span > 0, span, 1)
    return levels[np.abs(scaled[..., None] - levels).argmin(axis=-1)] * span + middle


def channel_levels(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`x [n, d]` coded by each channel's own levels, `table [d, levels]`."""
    return np.take_along_axis(table, np.abs(x[..., None] - table).argmin(axis=-1).T, axis=1).T


def coupled(x: np.ndarray, books: np.ndarray) -> np.ndarray:
    """Groups of channels replaced by the nearest rows of `books [groups, rows, c]`."""
    parts = np.split(x, len(books), axis=1)
    return np.concatenate(
        [b[np.square(p[:, None] - b).sum(-1).argmin(1)] for p, b in zip(parts, books, strict=True)],
        axis=1,
    )


def apart(x: np.ndarray, by: np.ndarray, rest, count: int = 1, fill=np.median) -> np.ndarray:
    """The `count` largest and smallest of each token, as `by [n, d]` ranks them, exact in float16;
    the rest coded by `rest`.
    """
    order = by.argsort(axis=1, kind="stable")
    taken = np.zeros(x.shape, bool)
    np.put_along_axis(
        taken, np.concatenate([order[:, :count], order[:, -count:]], axis=1), True, axis=1
    )
    return np.where(taken, half(x), rest(np.where(taken, fill(x, axis=1, keepdims=True), x)))


def block(x: np.ndarray) -> jax.Array:
    """`[n, d]` as a block of one head `[1, d, n]`."""
    return jnp.asarray(x.T[None])


def run(codec, x: np.ndarray) -> np.ndarray:
    payload, meta = codec.encode(block(x))
    assert payload.shape == (1, codec.rows(x.shape[1]), len(x)) and meta.shape == (
        1,
        codec.meta_rows,
        len(x),
    )
    return np.asarray(codec.decode(payload, meta))[0].T


@pytest.mark.daily(3)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_levels_of_a_tokens_range(bits):
    rng = np.random.default_rng(0)
    levels = half(np.sort(rng.uniform(-1, 1, 2**bits)))
    x = rng.normal(size=(40, 32)).astype(np.float32)
    codec = Levels(bits, jnp.asarray(levels[None], jnp.float16))
    np.testing.assert_allclose(run(codec, x), token_levels(x, levels), atol=1e-5)
    assert np.abs(run(codec, x) - token_levels(x, -levels[::-1])).max() > 0.05
    assert np.isfinite(run(codec, np.ones((3, 32), np.float32))).all()


def test_three_bits_are_packed_as_two_and_one():
    levels = np.linspace(-1, 1, 8).astype(np.float16)
    codes = np.random.default_rng(0).integers(0, 8, (32, 5))
    codes[:2] = [[0] * 5, [7] * 5]  # the ends of the range
    payload, _ = Levels(3, jnp.asarray(levels[None])).encode(
        jnp.asarray(levels[codes][None], jnp.float32)
    )
    expected = np.concatenate(
        [pack((codes & 3).astype(np.uint8), 2), pack((codes >> 2).astype(np.uint8), 1)]
    )
    np.testing.assert_array_equal(payload[0], expected)


@pytest.mark.slow
def test_outliers_of_keys_are_those_beyond_their_channels_range():
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=32) * 2)  # channels of very different size
    table = half(np.sort(rng.uniform(-1, 1, (1, 8))) * scale[:, None] + scale[:, None])
    x = (rng.normal(size=(50, 32)) * scale + scale).astype(np.float32)
    codec = Outliers(StaticLevels(3), 0.01, fill="median").for_block(32, 50)
    codec = codec.with_table(jnp.asarray(table[None, ..., None], jnp.float16))
    found = run(codec, x)
    scaled = (x - table[:, 0]) / (table[:, -1] - table[:, 0])
    np.testing.assert_allclose(
        found, apart(x, scaled, lambda rest: channel_levels(rest, table)), atol=1e-5
    )
    # ranked by size alone
    assert np.abs(found - apart(x, x, lambda rest: channel_levels(rest, table))).max() > 0.1


@pytest.mark.parametrize(
    ("bits", "share", "k_bits", "v_bits"),
    [(4, 0.01, 4.75, 5.25), (3, 0.01, 3.75, 4.25), (2, 0, 2, 2.5)],
)
def test_bits_an_element(bits, share, k_bits, v_bits):
    """At 64 channels one percent is one large and one small value: 2 (16 + 8) / 64 = 0.75 bits; a
    token's range is 32 / 64 = 0.5.
    """
    (fmt,) = dkv.kvquant(bits, share).formats("float32")
    fmt = fmt.for_block(64, 32)
    assert fmt.token_bytes(64) == (k_bits + v_bits) * 64 / 8


def test_levels_are_learned():
    """On the scale of the range without outliers; they lose less than even levels, Fisher weights
    move them, Q-Norm keeps the deviation.
    """
    rng = np.random.default_rng(0)
    x = (
        rng.laplace(size=(2, 16, 3000)).astype(np.float32)
        * np.exp(rng.normal(size=(2, 16, 1))).astype(np.float32)
        + 3
    )
    ones, codec = (
        jnp.ones_like(x),
        Outliers(StaticLevels(2), 0.02, fill="median").for_block(16, 3000),
    )

    def learn(fisher, **how) -> np.ndarray:
        return np.asarray(
            codec.fit(jnp.asarray(x), fisher, jax.random.key(0), HOW._replace(**how)),
            np.float32,
        )[..., 0]

    low, high = np.quantile(x, [0.01, 0.99], axis=-1)
    scale, middle = ((high - low) / 2)[..., None], ((high + low) / 2)[..., None]
    table = learn(ones)
    levels = (table - middle) / scale
    # the layer's levels in every channel
    np.testing.assert_allclose(levels, np.broadcast_to(levels[:1, :1], levels.shape), atol=5e-3)
    assert levels.min() > -1 and levels.max() < 1 and (np.diff(levels) > 0.1).all()
    scaled = (x - middle) / scale
    inside = np.abs(scaled) <= 1

    def error(levels: np.ndarray, weight=inside) -> float:
        return float(
            (np.square(np.abs(scaled[..., None] - levels).min(axis=-1)) * weight).sum()
            / weight.sum()
        )

    assert error(levels[0, 0]) < 0.7 * error(np.linspace(-1, 1, 4))
    fisher = np.where(scaled > 0.3, 10.0, 0.1).astype(np.float32)
    weighted = ((learn(jnp.asarray(fisher)) - middle) / scale)[0, 0]
    assert error(weighted, inside * fisher) < 0.7 * error(levels[0, 0], inside * fisher) and error(
        weighted
    ) > error(levels[0, 0])
    normed = ((learn(ones, q_norm=True) - middle) / scale)[0, 0]

    def deviation(levels: np.ndarray) -> float:
        """Of what is decoded, in that of what was coded; the codes are those of the levels as they
        were learned (appendix).
        """
        values = scaled[inside]
        return float(
            levels[np.abs(values[:, None] - table_levels).argmin(axis=1)].std() / values.std()
        )

    table_levels = levels[0, 0]
    assert deviation(table_levels) < 0.95 and abs(deviation(normed) - 1) < 0.02


def test_learned_levels_lose_less_than_even_ones():
    x = np.random.default_rng(0).normal(size=(600, 64)).astype(np.float32)
    table = Levels(3).fit(block(x), jnp.ones((1, 64, 600)), jax.random.key(0), HOW)
    learned, even = (
        np.square(y - x).mean() for y in (run(Levels(3, table), x), fake_quantise(x, 3))
    )
    assert 0.1 * even < learned < 0.8 * even


def test_a_low_rank_beside_changes_nothing_that_is_learned():
    x = np.random.default_rng(0).laplace(size=(1, 32, 64)).astype(np.float32)
    apart = Outliers(Levels(2), 0.05, fill="median").for_block(32, 64)
    codecs = (apart, LowRank(apart, 2).for_block(32, 64), Levels(2))
    with_rank, without, plain = (
        np.asarray(c.fit(jnp.asarray(x), jnp.ones_like(x), jax.random.key(0), HOW)) for c in codecs
    )
    np.testing.assert_array_equal(with_rank, without)
    assert (without != plain).any()


@lru_cache
def generated(name: str):
    """(calibration, output): after a prompt in three chunks and 30 tokens."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    text = np.random.default_rng(1).integers(0, 97, (4, 128))
    calibration = dkv.calibrate(
        model, params, text, POLICIES[name], samples=400, iterations=10, progress=False
    )
    out = dkv.generate(
        model,
        params,
        TOKENS,
        policy=POLICIES[name],
        max_new_tokens=30,
        prefill_chunk=32,
        calibration=calibration,
    )
    return calibration, out


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_attention_is_that_over_coded_tokens(name):
    """In layer 0 keys and values depend on the tokens alone: those of an exact cache, coded by the
    equations, are what attention reads.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    calibration, out = generated(name)
    cache, scale = out.cache, out.cache.spec.attention.sm_scale
    exact = dkv.CompressionPolicy(
        "exact",
        tiers=("full",),
        transform=dkv.WithoutRope(),
        schedule=dkv.Schedule(window=16, flush=8),
    )
    seen = np.concatenate([TOKENS, out.tokens[:, :-1]], axis=1)
    plain = dkv.generate(model, params, seen, policy=exact, max_new_tokens=1).cache
    q = np.random.default_rng(5).normal(size=(4, 2, 32)).astype(np.float32)
    heads = layer_heads(cache, jnp.int32(0), cache.recent_len)
    layout = layer_layout(cache, jnp.int32(0))
    found, _, _ = decode_attention(
        jnp.asarray(q), cache.pages, layout, heads, max_len=cache.spec.max_len, sm_scale=scale
    )
    for row in range(4):
        request, head = divmod(row, 2)
        held = held_tokens(plain, 0, request, head)
        recent = int(cache.recent_len[request])
        stored = seen.shape[1] - recent
        k, v = (np.stack([held[t][part] for t in range(stored)]) for part in (1, 2))
        window = [
            np.asarray(x)[0, request, head, :recent] for x in (cache.recent_k, cache.recent_v)
        ]
        key_table, levels = (np.asarray(x[0, head], np.float32) for x in calibration.tables[0])

        if name == "CQ keys":
            keys = apart(k, k, lambda rest, table=key_table: coupled(rest, table), fill=np.mean)
        else:
            keys = coded_keys(k, key_table)
        values = coded_values(v, levels)
        errors = [
            np.abs(found[row] - dense(q[row], coded_k, coded_v, *window, scale)).max()
            for coded_k, coded_v in (
                (keys, values),
                (k, values),
                (keys, v),
                (keys, token_levels(v, levels)),
            )
        ]
        assert errors[0] < 0.25 * min(errors[1:]), errors


def coded_keys(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    """KVQuant's keys `[n, d]`, outliers apart."""
    scaled = (x - table[:, 0, 0]) / (table[:, -1, 0] - table[:, 0, 0])
    return apart(x, scaled, lambda rest: channel_levels(rest, table[..., 0]))


def coded_values(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """KVQuant's values `[n, d]`, outliers apart."""
    return apart(x, x, lambda rest: token_levels(rest, levels))


@pytest.mark.slow
def test_sinks_stay_exact():
    """With `sinks` there is a tier for them alone; the others are coded as they leave it. The
    calibration does not look at sinks.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policy = dkv.kvquant(3, sinks=2, window=16, flush=8)
    text = np.random.default_rng(1).integers(0, 97, (2, 60))
    calibration = dkv.calibrate(
        model, params, text, policy, samples=120, iterations=3, progress=False
    )
    out = dkv.generate(
        model,
        params,
        TOKENS,
        policy=policy,
        max_new_tokens=30,
        prefill_chunk=32,
        calibration=calibration,
    )
    cache, stored = out.cache, 90 + 29 - np.asarray(out.cache.recent_len)
    np.testing.assert_array_equal(cache.tier_len[..., 0], np.full((2, 2, 2), 2))
    np.testing.assert_array_equal(
        cache.tier_len[..., 1], np.broadcast_to(stored[None, :, None] - 2, (2, 2, 2))
    )
    ids = np.asarray(cache.page_table)[..., 0]  # the first page of each head's high tier
    np.testing.assert_array_equal(
        np.sort(np.asarray(cache.pages.position)[ids][..., 0, :2]),
        np.broadcast_to([0, 1], (2, 2, 2, 2)),
    )
    exact = dkv.CompressionPolicy(
        "exact",
        tiers=("full",),
        transform=dkv.WithoutRope(),
        schedule=dkv.Schedule(window=16, flush=8),
    )
    seen = np.concatenate([TOKENS, out.tokens[:, :-1]], axis=1)
    plain = dkv.generate(model, params, seen, policy=exact, max_new_tokens=1).cache
    for request, head in np.ndindex(2, 2):
        held, alike = held_tokens(cache, 0, request, head), held_tokens(plain, 0, request, head)
        key_table, levels = (np.asarray(x[0, head], np.float32) for x in calibration.tables[1])
        assert [held[at][0] for at in (0, 1, 2)] == ["high", "high", "low"]
        for part, code in (
            (1, lambda x, table=key_table: coded_keys(x, table)),
            (2, lambda x, levels=levels: coded_values(x, levels)),
        ):
            found, bare = (
                np.stack([tokens[at][part] for at in range(stored[request])])
                for tokens in (held, alike)
            )
            np.testing.assert_allclose(found[:2], bare[:2], atol=1e-5)
            # a number between two levels may go to either
            off = np.abs(found - code(bare))[2:] > 1e-3
            assert off.mean() < 0.01 < 0.5 < (np.abs(found - bare)[2:] > 1e-3).mean()
    with_sinks = dkv.calibrate(
        model,
        params,
        text,
        dataclasses.replace(policy, protect=dkv.Protect()),
        samples=120,
        iterations=3,
        progress=False,
    )
    assert (with_sinks.tables[1][1] != calibration.tables[1][1]).any()


def dense(q, k, v, recent_k, recent_v, sm_scale: float) -> np.ndarray:
    """Softmax attention of `q [G, d]`: stored keys get their rotary embedding, those of the window
    have it.
    """
    pairs = (k[:, :16] + 1j * k[:, 16:]) * np.exp(1j * np.arange(len(k))[:, None] * FREQUENCIES)
    keys = np.concatenate([np.concatenate([pairs.real, pairs.imag], axis=1), recent_k])
    logits = q @ keys.T * sm_scale
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ np.concatenate([v, recent_v])


def test_json_and_bad_input():
    policy = POLICIES["kvquant"]
    assert dkv.CompressionPolicy.from_json(policy.to_json()) == policy and policy.tiers == (
        "K3sV3t+o1",
    )
    assert dkv.kvquant(2, 0).tiers == ("K2sV2t",)
    with pytest.raises(ValueError, match="bits=5"):
        dkv.kvquant(5)
    with pytest.raises(ValueError, match="takes no number"):
        KVFormat.parse("K3s4V3t")
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    with pytest.raises(ValueError, match="calibrate"):
        dkv.generate(model, params, TOKENS, policy=policy, max_new_tokens=1)
