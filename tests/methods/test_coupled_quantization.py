"""Coupled Quantization (arXiv:2405.03917): codes of neighbouring channels, their codebooks in the
cache, attention over them.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.cache.cache import complete
from diffkv_jax.cache.layer import LayerView, layer_heads, layer_layout
from diffkv_jax.cache.pool_size import cache_bytes
from diffkv_jax.calibration.kmeans import weighted_kmeans
from diffkv_jax.pallas_kernels.codecs import Coupled, KVFormat
from diffkv_jax.pallas_kernels.decode_attention import decode_attention
from diffkv_jax.testing.quantiser import pack
from diffkv_jax.testing.readback import check_pool, held_tokens
from diffkv_jax.testing.tiny import tiny_latent_model, tiny_model

TOKENS = np.random.default_rng(3).integers(0, 97, (2, 90))
POLICY = dkv.coupled_quantization(4, 8, window=16, flush=8)
FREQUENCIES = 10000.0 ** (-np.arange(16) / 16)


@lru_cache
def calibrated():
    """(model, params, calibration) of a tiny model."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    text = np.random.default_rng(1).integers(0, 97, (4, 128))
    return (
        model,
        params,
        dkv.calibrate(model, params, text, POLICY, samples=400, iterations=5, progress=False),
    )


@lru_cache
def generated():
    """A cache after a prompt in three chunks and 30 tokens, four of the compression events in
    decode.
    """
    model, params, calibration = calibrated()
    return dkv.generate(
        model,
        params,
        TOKENS,
        policy=POLICY,
        max_new_tokens=30,
        prefill_chunk=32,
        calibration=calibration,
    )


def nearest_rows(x: np.ndarray, books: np.ndarray) -> np.ndarray:
    """Each vector of channels of `x [n, d]` replaced by the nearest row of its codebook: eq. 4 of
    the paper, `books [d / c, 2**b, c]`.
    """
    groups, _, channels = books.shape
    parts = x.reshape(len(x), groups, 1, channels) - books[None].astype(np.float64)
    codes = np.square(parts).sum(axis=-1).argmin(axis=-1)
    return np.concatenate([books[g][codes[:, g]] for g in range(groups)], axis=1).astype(np.float32)


@pytest.mark.daily(3)
@pytest.mark.parametrize(("bits", "channels"), [(8, 4), (4, 2), (2, 1)])
def test_codes_are_the_nearest_rows(bits, channels):
    rng = np.random.default_rng(0)
    books = rng.normal(size=(3, 16 // channels, 2**bits, channels)).astype(np.float16)
    x = rng.normal(size=(3, 5, 16, 8)).astype(np.float32)
    codec = Coupled(bits, channels, jnp.asarray(books))
    payload, meta = codec.encode(jnp.asarray(x))
    decoded = np.asarray(codec.decode(payload, meta))
    assert meta.shape == (3, 5, 0, 8) and payload.shape == (3, 5, 16 // channels * bits // 8, 8)
    for head in range(3):
        for block in range(5):
            expected = nearest_rows(x[head, block].T, books[head])
            np.testing.assert_array_equal(decoded[head, block].T, expected)
            codes = [
                (books[head, g][:, None] == part).all(-1).argmax(0)
                for g, part in enumerate(np.split(expected, 16 // channels, 1))
            ]
            np.testing.assert_array_equal(
                payload[head, block], pack(np.array(codes, np.uint8), bits)
            )
    # another head's codebooks are others
    assert np.abs(decoded[0, 0].T - nearest_rows(x[0, 0].T, books[1])).max() > 0.1


@pytest.mark.parametrize(
    ("name", "bits"),
    [("K8v2V8v2", 4), ("K8v4V8v4", 2), ("K8v8V8v8", 1), ("K4v4V4v4", 1), ("K4v1V4v1", 4)],
)
def test_bits_an_element(name, bits):
    fmt = KVFormat.parse(name)
    assert fmt.name == name
    assert fmt.token_bytes(64) == 2 * 64 * bits / 8  # b / c bits, and nothing beside the codes


def test_coupled_channels_lose_less_than_single_ones():
    """At two bits an element, on channels that go together; and not on those that do not depend on
    each other.
    """
    rng = np.random.default_rng(0)

    def errors(x: np.ndarray) -> list[float]:
        def error(bits: int, channels: int) -> float:
            vectors = jnp.moveaxis(x.reshape(len(x), -1, channels), 1, 0)
            books = weighted_kmeans(
                vectors, jnp.ones(vectors.shape[:2]), jax.random.key(0), 2**bits, 20
            )
            return float(np.square(nearest_rows(x, np.asarray(books)) - x).mean() / x.var())

        return [error(2, 1), error(8, 4)]

    together = (rng.normal(size=(4000, 2)) @ rng.normal(size=(2, 8))).astype(np.float32)
    single, coupled = errors(together)
    assert 0.0001 < coupled < 0.2 * single
    single, coupled = errors(rng.normal(size=(4000, 8)).astype(np.float32))
    assert 0.6 * single < coupled < single


@pytest.mark.slow
def test_kept_tokens_are_the_nearest_rows():
    """In layer 0 keys and values depend on the tokens alone: those of a cache that keeps them
    exactly tell what is coded.
    """
    model, params, calibration = calibrated()
    exact = dkv.CompressionPolicy(
        "exact",
        tiers=("full",),
        transform=dkv.WithoutRope(),
        schedule=dkv.Schedule(window=16, flush=8),
    )
    plain = dkv.generate(model, params, TOKENS, policy=exact, max_new_tokens=1).cache
    cache = generated().cache
    keys, values = calibration.tables[0]
    for request in range(2):
        for head in range(2):
            coded, truth = (
                held_tokens(cache, 0, request, head),
                held_tokens(plain, 0, request, head),
            )
            at = range(74)  # not in the window of the plain cache
            for part, books in ((1, keys), (2, values)):
                found, exactly = (np.stack([held[t][part] for t in at]) for held in (coded, truth))
                expected = nearest_rows(exactly, books[0, head])
                agree = (found == expected).all(axis=1)
                # chunks round keys differently: some lie between two rows
                assert agree.mean() > 0.9
                np.testing.assert_allclose(
                    np.abs(found - exactly).mean(), np.abs(expected - exactly).mean(), rtol=0.02
                )
                assert (found == nearest_rows(exactly, books[0, 1 - head])).all(axis=1).mean() < 0.1
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)
    # decode has sent tokens into the pages too
    assert int(cache.counters.recent_len[0]) < 16 + 8 and int(cache.stored.tier_len.min()) > 90


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_attention_is_that_over_the_decoded_tokens(layer):
    cache = complete(generated().cache)
    spec = cache.spec
    q = np.random.default_rng(5).normal(size=(4, 2, 32)).astype(np.float32)
    view = LayerView(spec, jnp.int32(layer))
    out, _, _ = decode_attention(
        jnp.asarray(q), cache.stored.pages, layer_layout(cache, view),
        layer_heads(cache, view, cache.counters.recent_len),
        max_len=spec.max_len, sm_scale=spec.attention.sm_scale,
    )  # fmt: skip
    for row in range(4):
        request, head = divmod(row, 2)
        expected = dense(q[row], held_tokens(cache, layer, request, head), spec.attention.sm_scale)
        np.testing.assert_allclose(out[row], expected, atol=1e-4)
        other = dense(q[row], held_tokens(cache, 1 - layer, request, head), spec.attention.sm_scale)
        assert np.abs(out[row] - other).max() > 0.01


def dense(q: np.ndarray, held: dict, sm_scale: float) -> np.ndarray:
    """Softmax attention of `q [G, d]` over tokens whose stored keys get their rotary embedding;
    those of the window have it.
    """
    keys = []
    for position, (tier, k, _, _) in held.items():
        pairs = (k[:16] + 1j * k[16:]) * np.exp(1j * position * FREQUENCIES * (tier != "recent"))
        keys.append(np.concatenate([pairs.real, pairs.imag]))
    logits = q @ np.stack(keys).T * sm_scale
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (
        weights
        / weights.sum(axis=1, keepdims=True)
        @ np.stack([token[2] for token in held.values()])
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_latent_is_coded_and_its_rotary_part_is_not():
    """Multi-head latent attention: the one latent of all heads in codes of four channels; in layer
    0 it depends on the tokens alone.
    """
    model, params = tiny_latent_model()
    coded = dkv.CompressionPolicy(
        "latents", tiers=("K8v4V8v4",), schedule=dkv.Schedule(window=16, flush=8)
    )
    calibration = dkv.calibrate(
        model, params, TOKENS, coded, samples=150, iterations=3, progress=False
    )
    keys, nothing = calibration.tables[0]
    assert keys.shape == (2, 1, 16, 256, 4) and nothing is None
    exact = dkv.CompressionPolicy(
        "exact", tiers=("full",), schedule=dkv.Schedule(window=16, flush=8)
    )
    found, truth = (
        held_tokens(
            dkv.generate(
                model, params, TOKENS, policy=policy, calibration=one, max_new_tokens=1
            ).cache,
            0,
            1,
            0,
        )
        for policy, one in ((coded, calibration), (exact, None))
    )
    latents = np.stack([truth[t][1] for t in range(74)])
    np.testing.assert_array_equal(
        np.stack([found[t][1] for t in range(74)]), nearest_rows(latents, keys[0, 0])
    )
    assert (
        1e-4
        < np.abs(latents - nearest_rows(latents, keys[0, 0])).max()
        < np.abs(latents - nearest_rows(latents, keys[1, 0])).max()
    )
    np.testing.assert_array_equal(
        *(np.stack([held[t][2] for t in range(74)]) for held in (found, truth))
    )


@pytest.mark.slow
def test_the_cache_counts_its_tables_and_leaves_the_calibration_alone():
    cache = generated().cache
    # K and V, layers, heads, groups, rows, channels, float16
    books = 2 * 2 * 2 * (32 // 4) * 256 * 4 * 2
    assert sum(x.nbytes for x in jax.tree.leaves(cache.tables)) == books
    assert dkv.memory_report(cache).pool == cache_bytes(cache.spec, cache.policy) > books
    _, _, calibration = calibrated()
    assert calibration.tables[0][0].any()  # the cache was donated, this was not
    model, params, _ = calibrated()
    with pytest.raises(ValueError, match="smallest budget"):
        dkv.generate(
            model,
            params,
            TOKENS,
            policy=POLICY,
            memory_budget=books,
            calibration=calibration,
            max_new_tokens=1,
        )


def test_what_cannot_work():
    model, params, _ = calibrated()
    with pytest.raises(ValueError, match="calibrate"):
        dkv.generate(model, params, TOKENS, policy=POLICY, max_new_tokens=1)
    with pytest.raises(ValueError, match="bits=6"):
        dkv.coupled_quantization(4, 6)
    with pytest.raises(ValueError, match="head_dim=32 must be a multiple of channels=5"):
        dkv.generate(model, params, TOKENS, policy=dkv.coupled_quantization(5), max_new_tokens=1)


def test_json():
    assert dkv.CompressionPolicy.from_json(POLICY.to_json()) == POLICY
    assert dkv.load_policy("coupled_quantization").tiers == ("K8v4V8v4",)
