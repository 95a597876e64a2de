"""Transforms that learn a map a head: nothing changes where tokens are exact, and keys with large
offsets survive four bits.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.calibration.probe import activations
from diffkv_jax.evaluation import quality, teacher_forced
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.policy.affine import LEAST_SPREAD
from diffkv_jax.policy.transform import Seen, rotation
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import prompt, tiny_latent_model, tiny_model

DIM, HEADS, LAYERS = 32, 2, 2
SHORT = dkv.Schedule(window=16, flush=8)
TEXT = np.stack([prompt(200, seed) for seed in (5, 6)])
CALIBRATED_ON = np.stack([prompt(256, seed) for seed in (1, 2, 3)])
EVEN = dkv.even_channels()
LEARNED = dkv.Chain((dkv.Centered(), dkv.Learned()))
TRANSFORMS = [EVEN, dkv.Centered(), dkv.Balanced(), dkv.Balanced(1.0), LEARNED, dkv.Learned(0.0)]


@lru_cache
def model_with_offsets(offset: float):
    """(model, params): keys of the first layer have offsets of so many times what a seeded bias
    gives, in channels that turn slowly, as in Qwen2.5.
    """
    model, params = tiny_model(
        model_type="qwen2", q_heads=2 * HEADS, kv_heads=HEADS, head_dim=DIM, max_len=1024
    )
    params = jax.tree.map(lambda x: x, params)  # other dicts than those that tests share
    bias = np.zeros((LAYERS, HEADS, DIM), np.float32)
    slow = [DIM // 2 - 1, DIM // 2 - 2, DIM - 1, DIM - 2]
    bias[0][:, slow] = 0.2 * offset * np.random.default_rng(0).normal(size=(HEADS, len(slow)))
    params["layers"]["self_attn"]["k_proj"]["bias"] = jnp.asarray(bias.reshape(LAYERS, HEADS * DIM))
    return model, params


def policy_of(*tiers: str, transform: dkv.Transform, **stages) -> dkv.CompressionPolicy:
    return dkv.CompressionPolicy("x", tiers=tiers, transform=transform, schedule=SHORT, **stages)


def forced(policy: dkv.CompressionPolicy, offset: float = 100):
    """Log-probabilities and the cache, with what the transform learned of other texts."""
    model, params = model_with_offsets(offset)
    learned = policy.transform.learned
    given = dkv.calibrate(model, params, CALIBRATED_ON, policy, progress=False) if learned else None
    return teacher_forced(model, params, TEXT, 160, policy, calibration=given)


@lru_cache
def exact(offset: float = 100):
    return forced(policy_of("full", transform=dkv.Exact()), offset)


@pytest.mark.slow
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_exact_tokens_give_the_same_numbers(transform):
    log_probs, cache = forced(policy_of("full", transform=transform))
    np.testing.assert_allclose(log_probs, exact()[0], atol=1e-4)
    stored, plain = (held_tokens(c, 0, 1, 1)[20] for c in (cache, exact()[1]))
    assert np.abs(stored[1] - plain[1]).max() > 0.1


def test_what_is_stored_is_the_map_of_what_the_model_makes():
    """By NumPy, of the probe's keys and values, each with the squares of the attention it gets."""
    model, params = model_with_offsets(100)
    rows, length = np.asarray(CALIBRATED_ON), len(CALIBRATED_ON[0])
    context = min(4096, model.attention.max_position_embeddings)
    starts = [int(i * (context - length) / max(len(rows) - 1, 1)) for i in range(len(rows))]
    seen = [
        activations(model, params, jnp.asarray(row), first, gradients=False)
        for row, first in zip(rows, starts, strict=True)
    ]
    k, v, weight = (
        np.concatenate([np.asarray(getattr(s, name), np.float64)[:, :-1] for s in seen], axis=1)
        for name in ("k", "v", "weight")
    )
    weight = (weight / weight.sum(axis=1, keepdims=True))[..., None]
    mean, value_mean = ((weight * x).sum(axis=1) for x in (k, v))
    spread = np.sqrt((weight * (k - mean[:, None]) ** 2).sum(axis=1))
    spread = np.sqrt(np.maximum(spread, LEAST_SPREAD))
    spread /= np.exp(np.log(spread).mean(axis=-1, keepdims=True))
    _, cache = forced(policy_of("full", transform=EVEN))
    _, plain = exact()
    for layer in range(LAYERS):
        for head in range(HEADS):
            for at in (0, 33, 150, 198):
                made, held = (held_tokens(c, layer, 1, head)[at] for c in (plain, cache))
                wanted = (made[1] - mean[layer, head]) / spread[layer, head]
                np.testing.assert_allclose(held[1], wanted @ rotation(DIM), atol=2e-3)
                wanted = (made[2] - value_mean[layer, head]) @ rotation(DIM)
                np.testing.assert_allclose(held[2], wanted, atol=2e-3)


@pytest.mark.daily(2)
@pytest.mark.parametrize("tiers", [("K4V4",), ("K4nV4n",)])
def test_large_offsets_survive_four_bits(tiers):
    """Within twice the loss without offsets; without the protection it collapses."""

    def loss(transform: dkv.Transform, offset: float) -> float:
        log_probs, _ = forced(policy_of(*tiers, transform=transform), offset)
        return float(quality(exact(offset)[0], log_probs, TEXT[:, 160:]).kl.mean())

    calm = loss(EVEN, 1)
    assert loss(EVEN, 100) < 2 * calm + 1e-4
    for unprotected in (dkv.Exact(), dkv.Hadamard()):
        assert loss(unprotected, 100) > 2.5 * calm


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        policy_of("full", transform=EVEN, score=dkv.key_norm(0.5).score, keep=dkv.Budget(keep=0.5)),
        policy_of(
            "full", transform=EVEN, score=dkv.expected_attention(0.5).score, keep=dkv.Budget()
        ),
        policy_of("full", transform=EVEN, score=dkv.key_difference().score, keep=dkv.Budget()),
    ],
    ids=["key norm", "expected attention", "KeyDiff"],
)
def test_scores_see_keys_as_the_model_made_them(policy):
    _, cache = forced(policy)
    _, plain = forced(
        policy_of("full", transform=dkv.Exact(), score=policy.score, keep=policy.keep)
    )
    for ours, theirs in zip(dkv.kept_positions(cache), dkv.kept_positions(plain), strict=True):
        for row, wanted in zip(ours, theirs, strict=True):
            for head, same in zip(row, wanted, strict=True):
                assert len(set(head) ^ set(same)) <= 2  # ties within rounding


@pytest.mark.slow
@pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")
def test_native_kernels_store_the_same(tmp_path):
    """With what was saved and loaded again."""
    model, params = model_with_offsets(100)
    policy = dkv.diffkv(1.0, 0.0, window=16, flush=8, transform=EVEN)
    learned = dkv.calibrate(model, params, CALIBRATED_ON, policy, progress=False)
    learned.save(tmp_path / "learned")
    again = dkv.Calibration.load(tmp_path / "learned")
    assert again.transform == EVEN and len(again.maps) == 3
    outs = [
        dkv.generate(
            model,
            params,
            list(TEXT),
            policy=policy,
            calibration=given,
            implementation=implementation,
            max_new_tokens=20,
        )
        for given, implementation in ((learned, "xla"), (again, "cpu"))
    ]
    np.testing.assert_array_equal(outs[0].tokens, outs[1].tokens)


def test_the_squared_attention_of_each_token():
    """Of the probe, by NumPy: of the first layer, whose queries are those of its moments."""
    model, params = model_with_offsets(1)
    seen = activations(model, params, jnp.asarray(CALIBRATED_ON[0]), gradients=False)
    assert seen.weight.shape == (LAYERS, 256, HEADS)
    # the last token is seen by its own two queries alone, the first by all
    assert (np.asarray(seen.weight) <= 2 * (256 - np.arange(256))[:, None] + 1e-3).all()
    alone = activations(model, params, jnp.asarray(CALIBRATED_ON[0][:1]), gradients=False)
    np.testing.assert_allclose(alone.weight, 2.0)  # query heads of a KV head


def random_samples(tokens: int = 4000) -> Seen:
    """Keys and queries with moments that no diagonal fits, and values; of one head."""
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(tokens, 1, DIM)) @ (rng.normal(size=(DIM, DIM)) * 2.0 ** -np.arange(DIM))
        for _ in range(3)
    )
    weight = rng.uniform(size=(tokens, 1, 1)) ** 4
    return Seen(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, weight / weight.sum())))


def test_learned_maps():
    """Inverse to each other; the error of a codec with one scale a token is less than with any
    other map.
    """
    model, _ = model_with_offsets(1)
    seen, attention = random_samples(), model.attention

    def loss(transform: dkv.Transform) -> tuple[float, float]:
        """Of keys, the square of k' times that of the queries that read an even error; of values,
        likewise with what the output makes of one.
        """
        fitted = transform.fit(seen, attention)
        q, k = fitted.queries(seen.q, attention), fitted.keys(seen.k, attention)
        even = fitted.output(jnp.eye(DIM)[:, None]) - fitted.output(jnp.zeros((DIM, 1, DIM)))
        size = (
            seen.weight[..., 0] * jnp.square(jnp.stack([k, fitted.values(seen.v)])).sum(-1)
        ).sum(1)
        return (
            float(size[0, 0] * jnp.square(q).sum(-1).mean()),
            float(size[1, 0] * jnp.square(even).sum()),
        )

    best, turned = dkv.Learned().fit(seen, attention), dkv.Learned(0.0)
    np.testing.assert_allclose(
        jnp.einsum("nkd,nkd->n", best.queries(seen.q, attention), best.keys(seen.k, attention)),
        jnp.einsum("nkd,nkd->n", seen.q, seen.k),
        atol=1e-3,
    )
    for verb, x in ((best.keys, seen.k), (best.queries, seen.q)):
        again = verb(verb(x, attention), attention, back=True)
        np.testing.assert_allclose(again, x, atol=1e-4)
    np.testing.assert_allclose(best.output(best.values(seen.v)), seen.v, atol=1e-4)
    ours = loss(dkv.Learned())
    for other in (turned, dkv.Learned(0.3), dkv.Learned(0.8), dkv.Balanced()):
        assert ours[0] < loss(other)[0] and ours[1] <= loss(other)[1] * 1.001, other


def test_what_cannot_work():
    model, params = model_with_offsets(1)
    policy = policy_of("K4V4", transform=EVEN)
    with pytest.raises(ValueError, match="has transform=Chain.*calibration = diffkv_jax.calibrate"):
        dkv.generate(model, params, [TEXT[0]], policy=policy)
    other = dkv.calibrate(model, params, CALIBRATED_ON, policy_of("K4V4", transform=dkv.Centered()))
    with pytest.raises(ValueError, match="was made for transform=Centered.*calibrate with it"):
        dkv.generate(model, params, [TEXT[0]], policy=policy, calibration=other)
    with pytest.raises(ValueError, match="WithoutRope.* take it alone"):
        dkv.Chain((dkv.Centered(), dkv.WithoutRope()))
    with pytest.raises(TypeError, match="parts"):
        dkv.Chain(dkv.Hadamard())
    latent, its = tiny_latent_model()
    for transform in (dkv.Centered(), dkv.Balanced(), dkv.Learned()):
        with pytest.raises(ValueError, match=f"{transform}.*latents.*leave it out"):
            dkv.generate(latent, its, [TEXT[0]], policy=policy_of("full", transform=transform))


def test_json():
    policy = policy_of("K4V4", transform=dkv.Chain((dkv.Centered(), dkv.Balanced(0.25))))
    again = dkv.CompressionPolicy.from_json(policy.to_json())
    assert again == policy and again.transform.parts[1].power == 0.25


def test_axes_are_float16_where_the_model_does_not_compute_in_float32():
    model, params = model_with_offsets(1)
    policy = policy_of("K4V4", transform=LEARNED)
    learned = dkv.calibrate(model, params, CALIBRATED_ON, policy, progress=False)
    half = model.clone(dtype="bfloat16")
    for of, dtype in ((model, "float32"), (half, "float16")):
        found = dkv.make_cache(of, policy, [200], calibration=learned).policy.transform
        assert found.parts[1].key_axes.dtype == dtype, of.attention.dtype
        assert found.parts[0].key_mean.dtype == found.parts[1].key_scale.dtype == "float32"
