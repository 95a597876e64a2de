"""Calibration: gradients, weighted k-means, the file and what it refuses."""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.calibration.calibration import fingerprint
from diffkv_jax.calibration.kmeans import weighted_kmeans
from diffkv_jax.calibration.probe import Probe, activations
from diffkv_jax.testing.tiny import prompt, tiny_latent_model, tiny_model

TEXT = np.random.default_rng(1).integers(0, 97, (2, 40))
POLICY = dkv.coupled_quantization(4, 4, window=16, flush=8)


@lru_cache
def calibrated():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    return (
        model,
        params,
        dkv.calibrate(model, params, TEXT, POLICY, samples=60, iterations=3, progress=False),
    )


def biased_model():
    """A model whose keys and values have biases: the gradient by one is the sum over tokens of that
    by the keys or values.
    """
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 16, "max_len": 128}
    return tiny_model(model_type="qwen2", sharpness=1.0, **shape)


@jax.jit
def loss_of(params, tokens):
    """Mean negative log-likelihood of the next tokens, by the model without a cache."""
    logits, _ = biased_model()[0].apply(
        {"params": params}, tokens[None], jnp.arange(len(tokens))[None]
    )
    return -jnp.take_along_axis(
        jax.nn.log_softmax(logits[0, :-1]), tokens[1:, None], axis=-1
    ).mean()


def test_gradients_are_those_of_finite_differences():
    model, params = biased_model()
    tokens = jnp.asarray(prompt(24))
    seen = activations(model, params, tokens)
    frequencies = 10000.0 ** (-np.arange(8) / 8)
    turn = np.exp(-1j * np.arange(24)[:, None, None] * frequencies)
    halves = np.asarray(seen.k_gradient, np.float64)
    # biases are added before the rotary embedding
    bare = (halves[..., :8] + 1j * halves[..., 8:]) * turn
    sums = {
        "k_proj": np.concatenate([bare.real, bare.imag], axis=-1).sum(axis=1),
        "v_proj": np.asarray(seen.v_gradient, np.float64).sum(axis=1),
    }

    def moved(name: str, layer: int, channel: int, by: float) -> float:
        attention = params["layers"]["self_attn"]
        bias = attention[name]["bias"].at[layer, channel].add(by)
        changed = {
            **params["layers"],
            "self_attn": {**attention, name: {**attention[name], "bias": bias}},
        }
        return float(loss_of({**params, "layers": changed}, tokens))

    for name, gradient in sums.items():
        for layer, channel in ((0, 3), (0, 20), (1, 9), (1, 30)):
            slope = (moved(name, layer, channel, 0.05) - moved(name, layer, channel, -0.05)) / 0.1
            found = gradient[layer].reshape(-1)[channel]
            assert abs(found - slope) < 0.02 * np.abs(gradient[layer]).max(), (
                name,
                layer,
                channel,
                found,
                slope,
            )
    assert np.abs(sums["k_proj"]).max() > 1e-4 and np.abs(sums["v_proj"]).max() > 1e-3


@pytest.mark.parametrize("kind", ["windows", "latent"])
def test_the_probe_attends_as_the_model_does(kind):
    model, params = (
        tiny_latent_model()
        if kind == "latent"
        else tiny_model(q_heads=4, kv_heads=2, head_dim=32, windows=(None, 8))
    )
    tokens, positions = jnp.asarray(prompt(30))[None], jnp.arange(30)[None]
    plain, _ = model.apply({"params": params}, tokens, positions)
    probed, seen = model.apply(
        {"params": params}, tokens, positions, Probe.empty(model.attention, 30)
    )
    np.testing.assert_allclose(probed, plain, atol=1e-4)
    first = jnp.zeros_like(seen.k).at[:, 0].set(1.0)
    moved = dataclasses.replace(Probe.empty(model.attention, 30), add_k=first)
    assert np.abs(model.apply({"params": params}, tokens, positions, moved)[0] - plain).max() > 0.1


def test_weighted_kmeans():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2, 8, 3)) * 10
    x = (centres[:, np.arange(400) % 8] + rng.normal(size=(2, 400, 3)) * 0.1).astype(np.float32)
    found = np.asarray(
        weighted_kmeans(jnp.asarray(x), jnp.ones((2, 400)), jax.random.key(0), 8, 10)
    )
    for problem in range(2):
        distance = np.linalg.norm(found[problem][:, None] - centres[problem], axis=-1)
        assert (
            sorted(distance.argmin(axis=1)) == list(range(8)) and distance.min(axis=1).max() < 0.1
        )


def test_fisher_weights_lower_the_weighted_error_and_raise_the_plain_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 3000, 2)).astype(np.float32)
    weight = np.exp(3 * x[..., 0]).astype(np.float32)  # what lies to the right counts

    def errors(by: np.ndarray) -> tuple[float, float]:
        rows = np.asarray(
            weighted_kmeans(jnp.asarray(x), jnp.asarray(by), jax.random.key(0), 16, 30)
        )[0]
        squares = np.square(x[0][:, None] - rows).sum(axis=-1).min(axis=1)
        return float((weight[0] * squares).mean()), float(squares.mean())

    weighted, plain = errors(weight), errors(np.ones_like(weight))
    assert weighted[0] < 0.5 * plain[0]
    assert weighted[1] > 1.5 * plain[1]


@pytest.mark.slow
def test_tables_are_learned_from_what_is_stored():
    """Codebooks for exact copies of the tokens: as many rows as tokens are learned from, and each
    is one.
    """
    model, params, _ = calibrated()
    policy = dkv.coupled_quantization(4, 8, window=16, flush=8)
    for fisher in (True, False):
        calibration = dkv.calibrate(
            model, params, TEXT[:1], policy, samples=39, iterations=3, fisher=fisher, progress=False
        )
        seen = activations(model, params, jnp.asarray(TEXT[0]))
        values = np.asarray(seen.v)[1, :39, 0, 4:8]  # layer 1, head 0, group 1
        books = calibration.tables[0][1][1, 0, 1].astype(np.float32)
        assert np.abs(values[:, None] - books).max(axis=-1).min(axis=1).max() < 2e-3
        keys = np.asarray(seen.k)[0, :39, 1]
        turned = (keys[:, :16] + 1j * keys[:, 16:]) * np.exp(
            -1j * np.arange(39)[:, None] * 10000.0 ** (-np.arange(16) / 16)
        )
        books = calibration.tables[0][0][0, 1, 0].astype(np.float32)
        assert np.abs(turned.real[:, None, :4] - books).max(axis=-1).min(axis=1).max() < 5e-3
        assert np.abs(keys[:, None, :4] - books).max(axis=-1).min(axis=1).max() > 0.05


@pytest.mark.slow
def test_save_and_load(tmp_path):
    model, params, calibration = calibrated()
    calibration.save(tmp_path / "cq")
    loaded = dkv.Calibration.load(tmp_path / "cq")
    for field in ("tiers", "transform", "fingerprint"):
        assert getattr(loaded, field) == getattr(calibration, field)
    for pair, other in zip(loaded.tables, calibration.tables, strict=True):
        for x, y in zip(pair, other, strict=True):
            np.testing.assert_array_equal(x, y)
            assert x.dtype == np.float16
    first, second = (
        dkv.generate(
            model, params, TEXT[:1], policy=POLICY, max_new_tokens=6, calibration=one
        ).tokens
        for one in (calibration, loaded)
    )
    np.testing.assert_array_equal(first, second)
    with pytest.raises(ValueError, match="calibrate again"):
        dkv.Calibration.load(tmp_path)


def test_another_model_is_refused():
    model, params, calibration = calibrated()
    changed = jax.tree.map(lambda x: x, params)
    changed["norm"] = jax.tree.map(lambda x: x + 0.5, changed["norm"])
    for others in (changed, tiny_model(q_heads=4, kv_heads=2, head_dim=32, seed=1)[1]):
        with pytest.raises(ValueError, match="another model or other parameters"):
            dkv.generate(
                model, others, TEXT, policy=POLICY, max_new_tokens=1, calibration=calibration
            )
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert (
        fingerprint(dataclasses.replace(model, dtype="bfloat16"), half) == calibration.fingerprint
    )


REFUSED = {
    "nothing is learned": (dkv.quantized("K8V4"), "leave calibration= out"),
    "other tiers": (dkv.coupled_quantization(8, 8), "made for tiers"),
    "with RoPE": (
        dataclasses.replace(POLICY, transform=dkv.Exact()),
        "made for transform=WithoutRope",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    model, params, calibration = calibrated()
    policy, message = REFUSED[case]
    if case == "nothing is learned":
        calibration = dataclasses.replace(calibration, tiers=policy.tiers, transform=dkv.Exact())
    with pytest.raises(ValueError, match=message):
        dkv.generate(model, params, TEXT, policy=policy, max_new_tokens=1, calibration=calibration)
    with pytest.raises(ValueError, match=message):
        dkv.make_cache(model, policy, [60], calibration=calibration)


def test_bad_calibration_text():
    model, params, _ = calibrated()
    for tokens, message in (
        ([[1, 2], [3]], "one length"),
        ([[1]], "at least 2"),
        ([[1, 99]], "token id 99"),
    ):
        with pytest.raises(ValueError, match=message):
            dkv.calibrate(model, params, tokens, POLICY)
    with pytest.raises(ValueError, match="no learned codec"):
        dkv.calibrate(model, params, TEXT, dkv.quantized("K8V4", transform=dkv.Exact()))
    with pytest.raises(ValueError, match="samples=0"):
        dkv.calibrate(model, params, TEXT, POLICY, samples=0)


def test_sequences_begin_at_positions_over_the_whole_context():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    texts = np.stack([prompt(40, 1)] * 2)

    def means(context, transform):
        policy = dkv.quantized("K8V8", transform=transform)
        found = dkv.calibrate(model, params, texts, policy, context=context, progress=False)
        return np.asarray(found.maps[0], np.float64)

    near, far = means(40, dkv.Centered()), means(3000, dkv.Centered())
    # that of one text at both places: half of it lies where it was, half is turned by 2,960 steps
    half, angle = near.shape[-1] // 2, 2960 * np.asarray(model.attention.rope)
    pair = near[..., :half] + 1j * near[..., half:]
    expected = pair * (1 + np.exp(1j * angle)) / 2
    expected = np.concatenate([expected.real, expected.imag], axis=-1)
    np.testing.assert_allclose(far, expected, atol=2e-3 * np.abs(near).max())
    assert np.abs(far - near).max() > 0.1 * np.abs(near).max()
    with pytest.raises(ValueError, match="context=39"):
        means(39, dkv.Centered())
