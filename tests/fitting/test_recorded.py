"""Policies behind prompts that were read once, against the model that reads them itself."""

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.fitting.candidates import Path
from diffkv_jax.fitting.measure import Bench
from diffkv_jax.fitting.texts import STEPS, Texts
from diffkv_jax.testing.tiny import prompt, tiny_latent_model, tiny_model

CONTEXT = 200
TEXTS = Texts(np.stack([prompt(CONTEXT + STEPS + 1, seed) for seed in range(2)]), CONTEXT)
SMALL = {"window": 16, "flush": 8}


def both(model, params):
    return (Bench(model, params, TEXTS, CONTEXT, replays=replays) for replays in (False, True))


def same(model, params, policies):
    read, replayed = both(model, params)
    np.testing.assert_allclose(replayed.full, read.full, atol=2e-4)
    for policy in policies:
        one, other = (bench.of(policy, None) for bench in (read, replayed))
        assert one.mean_kl > 1e-5, policy  # so that a KL of another policy would be seen
        np.testing.assert_allclose(other.kl, one.kl, atol=1e-5, rtol=1e-2)
        assert other.share == pytest.approx(one.share, rel=1e-6)


def test_decides_and_predicts_as_a_model_that_reads():
    tiers = ("K4V4", "K2V2")
    policies = (dkv.quantized("K4V4", **SMALL), dkv.diffkv(1.0, 0.3, tiers=tiers, **SMALL))
    same(*tiny_model(), policies)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [None, (48, None)])
def test_reads_once_more_what_is_ranked_by_a_repetition(windows):
    model, params = tiny_model() if windows is None else tiny_model(windows=windows)
    shorter = dkv.Replay(chunk=64)  # than the text: four passes
    same(model, params, [dkv.kvzip(0.4, **SMALL), dkv.kvzip(0.4, replay=shorter, **SMALL)])


@pytest.mark.slow
def test_latents():
    same(*tiny_latent_model(), [dkv.quantized("K4V4", **SMALL)])


@pytest.mark.slow
def test_requests_at_several_places_of_a_path_are_those_rows_over_and_over():
    model, params = tiny_model()
    replayed = Bench(model, params, TEXTS, CONTEXT, replays=True)
    one, two = (dkv.diffkv(alpha, 0.0, **SMALL) for alpha in (0.5, 4.0))
    mixed = dkv.diffkv((((0.5,), (0.5,), (4.0,), (4.0,)),), 0.0, **SMALL)
    log_probs, _ = replayed._run(mixed, None, copies=2)
    for rows, policy in ((log_probs[:2], one), (log_probs[2:], two)):
        np.testing.assert_allclose(rows, replayed._run(policy, None)[0], atol=1e-4)


@pytest.mark.slow
def test_one_ranking_serves_all_places_of_a_path():
    model, params = tiny_model()
    replayed = Bench(model, params, TEXTS, CONTEXT, replays=True)
    path = Path("repeating", ("K8V8", "K4V4"), high=0.3, window=16)
    once = replayed.along(path, [0.4, 0.9], dkv.Exact(), None)
    apart = [replayed.of(path.policy(dkv.Exact(), [point]), None) for point in (0.4, 0.9)]
    assert once[0].mean_kl < 0.9 * once[1].mean_kl
    for one, other in zip(once, apart, strict=True):
        np.testing.assert_allclose(one.kl, other.kl, atol=1e-5, rtol=1e-2)
        assert one.share == pytest.approx(other.share, rel=1e-6)
