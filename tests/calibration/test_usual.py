"""The usual transform: what it stands for, where it is learned, and that offsets do no harm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.calibration.sample_text import SampleText
from diffkv_jax.calibration.usual import LEARNED, with_usual
from diffkv_jax.evaluation import quality, teacher_forced
from diffkv_jax.testing.tiny import prompt, tiny_latent_model, tiny_model

EXACT = dkv.Exact()
TEXT = np.stack([prompt(200, seed) for seed in (5, 6)])
POLICY = dkv.diffkv(1.0, 0.0, window=16, flush=8)


def reading(model):
    """The same with a text of its own, as `load_pretrained` gives one."""
    return model.clone(text=SampleText(prompt(4 * 1024, 1), prompt(0)))


def capped(model):
    return model.clone(config=dataclasses.replace(model.config, attn_logit_softcapping=5.0))


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFKV_JAX_CACHE", str(tmp_path))
    return tmp_path


def test_what_it_stands_for():
    attention = tiny_model()[0].attention
    for policy, found in (
        (POLICY, LEARNED),
        (dkv.quantized("K4nV2n"), LEARNED),
        (dkv.snapkv(0.5, tiers=("K8V4",)), LEARNED),
        (dkv.snapkv(0.5), EXACT),
        (dkv.CompressionPolicy.none(), EXACT),
        (dkv.kivi(), EXACT),
        (dkv.quantized("K4cV4"), EXACT),
        (dkv.gear(), EXACT),
        (dkv.coupled_quantization(), dkv.WithoutRope()),
        (dkv.load_policy("diffkv_minicache"), EXACT),
        (dkv.quantized("K4V4", transform=EXACT), EXACT),
        (dkv.turboquant(), dkv.Hadamard()),
        (dkv.quantized("K4V4", transform=dkv.Centered()), dkv.Centered()),
    ):
        assert with_usual(policy, attention).transform == found, policy
    assert with_usual(POLICY, tiny_latent_model()[0].attention).transform == EXACT
    assert with_usual(POLICY, capped(tiny_model()[0]).attention).transform == dkv.Learned()


def test_learned_where_the_model_has_a_text_and_only_there(folder):
    model, params = tiny_model()
    run = {"policy": POLICY, "max_new_tokens": 2}
    plain = dkv.generate(model, params, TEXT, **run)
    assert plain.cache.policy.transform == EXACT and not (folder / "calibrations").exists()
    out = dkv.generate(reading(model), params, TEXT, **run)
    found = out.cache.policy.transform
    assert isinstance(found, dkv.Chain) and float(jnp.abs(found.parts[0].key_mean).max()) > 0
    assert len(list((folder / "calibrations").iterdir())) == 1
    spelled = dataclasses.replace(POLICY, transform=LEARNED)
    again = dkv.generate(reading(model), params, TEXT, **{**run, "policy": spelled})
    jax.tree.map(np.testing.assert_array_equal, again.cache.policy.transform, found)


def test_a_calibration_says_what_it_is():
    model, params = tiny_model()
    learned = dkv.calibrate(model, params, TEXT, POLICY, progress=False)
    assert learned.transform == LEARNED
    cache = dkv.make_cache(model, POLICY, [300], calibration=learned)
    assert isinstance(cache.policy.transform, dkv.Chain)
    assert dkv.make_cache(model, POLICY, [300]).policy.transform == EXACT
    other = dataclasses.replace(POLICY, transform=dkv.Centered())
    with pytest.raises(ValueError, match="calibration was made for transform"):
        dkv.make_cache(model, other, [300], calibration=learned)


@pytest.mark.slow
def test_offsets_of_keys_do_no_harm():
    """Key biases of the first layer a hundred times larger: within twice the KL without them. As
    the model makes its keys, it collapses.
    """

    def mean_kl(size: float, policy: dkv.CompressionPolicy) -> float:
        model, params = tiny_model(
            model_type="qwen2", q_heads=4, kv_heads=2, head_dim=32, max_len=2048
        )
        params = jax.tree.map(lambda x: x, params)
        bias = np.zeros((2, 2, 32), np.float32)
        slow = [14, 15, 30, 31]
        bias[0][:, slow] = 0.2 * np.random.default_rng(0).normal(size=(2, 4))
        params["layers"]["self_attn"]["k_proj"]["bias"] = jnp.asarray(size * bias.reshape(2, 64))
        model = reading(model)
        full, _ = teacher_forced(model, params, TEXT[:, :-1], 160, None)
        log_probs, _ = teacher_forced(model, params, TEXT[:, :-1], 160, policy)
        return float(quality(full, log_probs, TEXT[:, 161:]).kl.mean())

    for policy in (POLICY, dkv.quantized("K4V4", window=16, flush=8)):
        calm = mean_kl(1, policy)
        assert mean_kl(100, policy) < 2 * calm + 1e-4
        assert mean_kl(100, dataclasses.replace(policy, transform=EXACT)) > 2.5 * calm
