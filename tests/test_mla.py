"""Multi-head latent attention over the cache: only the latent and its rotary key are kept, and
every policy works on them.
"""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.pallas_kernels.codecs import LatentFormat
from diffkv_jax.policy.transform import rotation
from diffkv_jax.read_prompts import prefill
from diffkv_jax.testing.quantiser import dequantise, quantise
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import tiny_latent_model

RANK, ROPE = 64, 16  # of the tiny model
TOKENS = np.random.default_rng(2).integers(0, 97, (2, 112)).astype(np.int32)
CONTEXT = 96
EXACT = dkv.CompressionPolicy.none(window=16, flush=8)
# evict, then four bits for the latent
COMPOSED = dkv.snapkv(0.5, tiers=("K4V4",), window=16, flush=8, sinks=2)


@lru_cache
def uncached(tiny=tiny_latent_model, **config_changes) -> np.ndarray:
    """Log-probabilities of the model without a cache, keys and values of every head made: what
    `transformers` agrees with.
    """
    model, params = tiny()
    model = model.clone(config=dataclasses.replace(model.config, **config_changes))
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    logits, _ = jax.jit(model.apply)({"params": params}, TOKENS, positions)
    return np.asarray(jax.nn.log_softmax(logits))


def prompted(policy: dkv.CompressionPolicy, size: int = 64, **options):
    """Logits of the last token and the cache after the first row as a prompt, in chunks of `size`;
    `options` are those of `make_cache`.
    """
    model, params = tiny_latent_model()
    lengths = np.array([TOKENS.shape[1]], np.int32)
    return prefill(
        model, params, dkv.make_cache(model, policy, lengths, **options), TOKENS[:1], lengths, size
    )


def first_layers_keys() -> tuple[np.ndarray, np.ndarray]:
    """(c, k_R) of the first layer for the first row, float32 [tokens, channels], from the equations
    of arXiv:2405.04434 (9 to 15).
    """
    model, params = tiny_latent_model()
    layer = jax.tree.map(lambda x: np.asarray(x, np.float64)[0], params["dense_layers"])

    def normed(x, weight, eps):
        return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * weight

    h = normed(
        np.asarray(params["embed_tokens"]["embedding"], np.float64)[TOKENS[0]],
        layer["input_layernorm"]["weight"],
        1e-6,
    )
    down = h @ layer["self_attn"]["kv_a_proj_with_mqa"]["kernel"]
    c = normed(down[:, :RANK], layer["self_attn"]["kv_a_layernorm"]["weight"], 1e-6)
    # the checkpoint pairs neighbouring channels
    pairs = down[:, RANK::2] + 1j * down[:, RANK + 1 :: 2]
    turned = pairs * np.exp(
        1j * np.outer(np.arange(len(h)), 10000.0 ** (-np.arange(ROPE // 2) / (ROPE // 2)))
    )
    return c, np.concatenate([turned.real, turned.imag], axis=1)


@pytest.mark.slow
def test_the_absorbed_full_cache_equals_plain_attention():
    model, params = tiny_latent_model()
    log_probs, cache = teacher_forced(model, params, TOKENS, CONTEXT, EXACT, prefill_chunk=64)
    wanted = uncached()[:, CONTEXT:]
    np.testing.assert_allclose(log_probs, wanted, atol=1e-4)
    assert cache.recent.v is None and cache.recent.k.shape[-1] == RANK + ROPE
    wrong = uncached(query_pre_attn_scalar=20.0)  # the scale without the rotary channels
    assert np.abs(log_probs - wrong[:, CONTEXT:]).max() > 1e-2


def with_experts():
    """Layers without and with experts, two of four for a token, and queries from a latent of their
    own.
    """
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32}
    return tiny_latent_model(layers=3, first_k_dense_replace=1, q_lora_rank=24, **experts)


@pytest.mark.slow
def test_experts_over_a_cache():
    """Both stacks of layers find their part of the cache, and what a row's tokens are given to does
    not depend on its neighbours.
    """
    model, params = with_experts()
    log_probs, cache = teacher_forced(model, params, TOKENS, CONTEXT, EXACT, prefill_chunk=64)
    assert len(cache.spec.paged_layers) == 3
    np.testing.assert_allclose(log_probs, uncached(with_experts)[:, CONTEXT:], atol=1e-4)
    assert np.abs(log_probs - np.roll(log_probs, 1, axis=1)).max() > 1e-2
    both = dkv.generate(
        model, params, [TOKENS[0], TOKENS[1, :70]], policy=COMPOSED, max_new_tokens=12, max_len=128
    )
    alone = dkv.generate(
        model, params, [TOKENS[1, :70]], policy=COMPOSED, max_new_tokens=12, max_len=128
    )
    np.testing.assert_array_equal(both.tokens[1], alone.tokens[0])


@pytest.mark.daily(2)
@pytest.mark.parametrize("right", [True, False])
def test_values_are_the_first_channels(monkeypatch, right):
    """A cache that mixes the last ones instead, rotary channels among them, is told from plain
    attention.
    """
    if not right:
        monkeypatch.setattr(LatentFormat, "values", lambda self, k, v: k[..., -self.rank :])
    logits, _ = prompted(EXACT, max_len=128 if right else 160)  # another program
    error = np.abs(np.asarray(jax.nn.log_softmax(logits))[0] - uncached()[0, -1]).max()
    assert error < 1e-4 if right else error > 1e-2


@pytest.mark.slow
def test_greedy_text_is_that_of_plain_attention():
    model, params = tiny_latent_model()
    out = dkv.generate(model, params, TOKENS[:, :CONTEXT], policy=EXACT, max_new_tokens=12)
    # as long as `TOKENS`
    joined = np.concatenate([TOKENS[:, :CONTEXT], out.tokens, TOKENS[:, :4]], axis=1)
    logits, _ = jax.jit(model.apply)(
        {"params": params}, joined, jnp.broadcast_to(jnp.arange(joined.shape[1]), joined.shape)
    )
    np.testing.assert_array_equal(
        np.asarray(logits).argmax(axis=-1)[:, CONTEXT - 1 : CONTEXT + 11], out.tokens
    )
    assert len(set(out.tokens.ravel().tolist())) > 4


def test_what_is_kept_is_the_latent_and_the_rotary_key():
    c, rotary = first_layers_keys()
    exact = held_tokens(prompted(EXACT)[1], 0, 0, 0)
    for at in (0, 33, 90):
        assert exact[at][0] == "high"
        np.testing.assert_allclose(exact[at][1], c[at], atol=1e-4)
        np.testing.assert_allclose(exact[at][2], rotary[at], atol=1e-4)
    # in the recent window
    np.testing.assert_allclose(exact[105][1], np.concatenate([c[105], rotary[105]]), atol=1e-4)


@pytest.mark.slow
def test_eviction_and_four_bits_are_one_policy():
    """Latents of half the tokens at four bits: it runs, frees pages, and takes the bytes of the
    formula; a row is as if alone.
    """
    policy = dkv.CompressionPolicy.from_json(COMPOSED.to_json())
    assert policy == COMPOSED
    model, params = tiny_latent_model()
    both = dkv.generate(
        model, params, [TOKENS[0], TOKENS[1, :70]], policy=policy, max_new_tokens=12, max_len=128
    )
    alone = dkv.generate(
        model, params, [TOKENS[1, :70]], policy=policy, max_new_tokens=12, max_len=128
    )
    np.testing.assert_array_equal(both.tokens[1], alone.tokens[0])
    report, seen = dkv.memory_report(both.cache), np.asarray(both.cache.counters.seq_len)
    stored, recent = report.tokens[:, 0, 0, 0], report.tokens[:, 0, 0, 1]
    came_since = seen[0] - TOKENS.shape[1] - (recent - 16)
    # half of the prompt, less its window
    assert (stored == TOKENS.shape[1] // 2 - 16 + came_since).all()
    side = 4 + 2  # significance and position
    # codes, the rotary key in float32, scale and zero point
    token = RANK * 4 // 8 + ROPE * 4 + 4 + side
    np.testing.assert_array_equal(report.logical_bytes[:, 0, 0, 0], stored * token)
    np.testing.assert_array_equal(
        report.logical_bytes[:, 0, 0, 1], recent * ((RANK + ROPE) * 4 + 4)
    )
    np.testing.assert_array_equal(report.bf16_bytes, seen * 2 * (RANK + ROPE) * 2)
    full = dkv.memory_report(prompted(EXACT)[1]).allocated_bytes[:, 0, 0, 0]
    assert (report.allocated_bytes[:, 0, 0, 0] < 0.3 * full).all()


def test_the_share_of_the_formula():
    """DeepSeek-V2-Lite's sizes: half of the tokens, 512 channels at 4 bits and 64 rotary ones in
    bfloat16, are 0.17 of its cache.
    """
    layout = dkv.CacheSpec.build(
        dkv.AttentionSpec(
            27, 16, 1, 576, (None,) * 27, 192**-0.5, None, 100, 4096, "bfloat16", latent=512
        ),
        dkv.quantized("K4V4"),
        num_requests=1,
        max_len=4096,
        num_pages=0,
        dtype="bfloat16",
    ).layout
    bits = 8 * (layout.formats[0].token_bytes(576) - 4)  # without scale and zero point
    assert bits == 512 * 4 + 64 * 16
    assert 0.5 * bits / (576 * 16) == pytest.approx(0.17, abs=0.005)


@pytest.mark.slow
@pytest.mark.long
def test_two_tiers_and_thresholds():
    """Latents of high tokens at eight bits, of low ones at four, as the quantiser gives them;
    rotary keys exact; some tokens dropped.
    """
    _, cache = prompted(
        dkv.diffkv(1.0, 0.6, tiers=("K8V8", "K4V4"), window=16, flush=8, queries=32)
    )
    report, (c, rotary) = dkv.memory_report(cache), first_layers_keys()
    assert (report.tokens[:, 0, 0] > 0).all() and report.dropped.sum() > 0
    stored = {
        at: token for at, token in held_tokens(cache, 0, 0, 0).items() if token[0] != "recent"
    }
    eight, four = (dequantise(*quantise(c.astype(np.float32), bits, 1)) for bits in (8, 4))
    for at, (tier, latent, rope, _) in stored.items():
        near, far = (eight, four) if tier == "high" else (four, eight)
        step = np.ptp(c[at]) / 255
        # a code may round either way
        assert np.abs(latent - near[at]).max() < (1.1 if tier == "high" else 8.6) * step < 18 * step
        assert np.abs(latent - far[at]).max() > 3 * step
        np.testing.assert_allclose(rope, rotary[at], atol=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_latents_have_learned_codes():
    """Coupled Quantization of the latent alone: what is kept are the nearest rows of its codebooks,
    and the rotary key.
    """
    model, params = tiny_latent_model()
    # four bits for two channels
    policy = dkv.CompressionPolicy(
        "coupled", tiers=("K4v2V4v2",), schedule=dkv.Schedule(window=16, flush=8)
    )
    text = np.random.default_rng(1).integers(0, 97, (2, 64))
    calibration = dkv.calibrate(
        model, params, text, policy, samples=100, iterations=2, progress=False
    )
    _, cache = prompted(policy, calibration=calibration)
    ((books, nothing),) = cache.tables
    assert books.shape == (2, 1, RANK // 2, 16, 2) and nothing is None
    c, rotary = first_layers_keys()
    held, rows = held_tokens(cache, 0, 0, 0), np.asarray(books[0, 0], np.float64)
    for at in (0, 40, 80):
        parts = c[at].reshape(-1, 1, 2)
        nearest = rows[
            np.arange(len(rows)), np.square(parts - rows).sum(axis=-1).argmin(axis=1)
        ].ravel()
        # rounding may choose between two rows as far away
        assert np.isclose(held[at][1], nearest, atol=1e-6).mean() > 0.9
        np.testing.assert_allclose(held[at][2], rotary[at], atol=1e-4)
        assert np.abs(nearest - c[at]).mean() > 0.01


@pytest.mark.slow
def test_key_norm_ranks_by_the_rotary_key_and_only_the_latent_is_rotated():
    """The latent has passed a norm: its length says nothing. The prompt is attended exactly, so
    that a rotation changes no logit.
    """
    c, rotary = first_layers_keys()
    policy = dkv.key_norm(
        56, whole_layers=(), window=16, flush=8, sinks=2, transform=dkv.Hadamard()
    )
    logits, cache = prompted(policy, size=128)
    np.testing.assert_allclose(jax.nn.log_softmax(logits)[0], uncached()[0, -1], atol=1e-4)
    held = held_tokens(cache, 0, 0, 0)
    kept = set(held)
    candidates = np.arange(2, TOKENS.shape[1] - 16)

    def smallest(keys: np.ndarray) -> set[int]:
        order = candidates[np.argsort(np.linalg.norm(keys[candidates], axis=1), kind="stable")]
        return {0, 1, *order[: 56 - 18].tolist(), *range(TOKENS.shape[1] - 16, TOKENS.shape[1])}

    assert len(kept) == 56 and kept == smallest(rotary)
    assert smallest(np.concatenate([c, rotary], axis=1)) != kept != smallest(c)
    for at in (0, 1):  # sinks
        np.testing.assert_allclose(held[at][1], c[at] @ rotation(RANK), atol=1e-4)
        np.testing.assert_allclose(held[at][2], rotary[at], atol=1e-4)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (
            dkv.quantized("K8V4"),
            {},
            "format 'K8V4' keeps keys and values differently.*such as 'K8V8'",
        ),
        (
            dkv.CompressionPolicy("bare", tiers=("full",), transform=dkv.WithoutRope()),
            {},
            "a latent carries no rotary embedding anyway",
        ),
        (EXACT, {"implementation": "cpu"}, "runs in plain XLA only"),
    ],
)
def test_what_cannot_work(policy, options, message):
    model, params = tiny_latent_model()
    with pytest.raises(ValueError, match=message):
        dkv.generate(model, params, TOKENS, policy=policy, max_new_tokens=1, **options)


@pytest.mark.parametrize(
    "changes", [{"num_kv_heads": 2}, {"latent": 80}, {"latent": 0}, {"sliding_windows": (None, 4)}]
)
def test_a_latent_that_does_not_add_up_is_refused(changes):
    model, _ = tiny_latent_model()
    with pytest.raises(
        ValueError, match="latent=.* must be between 0 and head_dim=80, with num_kv_heads=1"
    ):
        dataclasses.replace(model.attention, **changes)
