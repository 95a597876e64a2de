"""What "auto" and the judge refuse, and at once; stand-ins for the fit and for what is measured."""

import dataclasses

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.calibration.sample_text import SampleText
from diffkv_jax.choice import automatic, judged
from diffkv_jax.evaluation import on_texts, teacher_forced
from diffkv_jax.fitting.measure import share_at
from diffkv_jax.testing.tiny import prompt, tiny_latent_model, tiny_model

RUN = {"max_new_tokens": 2}


def reading(**changes):
    model, params = tiny_model(**changes)
    return model.clone(text=SampleText(prompt(2400, 1), prompt(0))), params


class Asked(Exception):
    """The fit or the judge was asked."""


def asked(*given, **goal):
    raise Asked(goal)


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """Refuses the call with a message before anything is fitted; without one it is fitted."""
    monkeypatch.setenv("DIFFKV_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(automatic, "_fits", [asked])
    automatic._known.clear()
    model, params = reading()

    def call(said: str | None, function=dkv.generate, prompts=([1, 2, 3],), **given):
        error = Asked if said is None else (ValueError, TypeError)
        with pytest.raises(error, match=said) as seen:
            function(model, params, prompts, **{"policy": "auto"} | given)
        return seen.value

    return call


def test_bad_input_is_refused_before_a_fit(refused):
    for name, wrong in (
        ("memory_budget", "lots"),
        ("memory_budget", {1}),
        ("max_len", "long"),
        ("max_len", -5),
        ("max_len", 10**6),
        ("cache_dtype", "int3"),
        ("prefill_chunk", 77),
        ("implementation", "c"),
        ("calibration", 3),
    ):
        for policy in ("auto", dkv.AutoPolicy(share=0.5)):
            refused(name, **{name: wrong}, policy=policy)
    refused("request 0 may come to", prompts=[prompt(5000)])
    refused("prefill_chunk=16", prompts=[prompt(300)], prefill_chunk=16)
    refused(None)

    def forced(model, params, prompts, **given):
        teacher_forced(model, params, np.array(prompts), 2, **given)

    refused("max_len", forced, max_len=10**6)
    refused("cache_dtype", forced, cache_dtype="int3")
    refused(None, forced)


def test_numbers_of_any_kind_are_one_goal(refused):
    for budget in (np.int64(2**20), 2**20, "1MiB"):
        goal = refused(None, memory_budget=budget).args[0]
        # texts differ, and a policy that drops would hold the prompt whole before it does
        assert goal["memory_budget"] == int(0.9 * 2**20) and goal["drop"] is True
    auto = dkv.AutoPolicy(share=np.float32(0.5), target_kl=None, drop=np.bool_(True))
    assert auto == dkv.AutoPolicy(share=0.5) and type(auto.share) is float
    assert refused(None, policy=auto).args[0]["share"] == 0.5
    refused("policy=", policy=np.array([1, 2]))


def test_a_cache_alone_cannot_be_fitted():
    model, params = reading()
    for policy in ("auto", dkv.AutoPolicy()):
        with pytest.raises(ValueError, match="fit_policy"):
            dkv.make_cache(model, policy, [100])


def test_functions_that_take_no_fitted_policy_say_what_to_give():
    model, params = reading()
    report = dkv.FitReport(*[0.0] * 8, 1024, 256, 2, 0.0)
    found = dkv.FittedPolicy(dkv.diffkv(1, 0), None, report, "a", {"share": 0.3})
    for policy, said in ((found, "give its .policy"), ("auto", "fit_policy")):
        with pytest.raises(ValueError, match=said):
            on_texts(model, params, np.zeros((1, 40), int), 20, policy)


@pytest.mark.slow
def test_auto_keeps_to_a_budget(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFKV_JAX_CACHE", str(tmp_path))
    automatic._known.clear()
    model, params = reading()
    prompts, whole = [prompt(980, 1), prompt(975, 3)], 2 * 1024 * 2 * 64 * 2 * 2
    given = {"policy": "auto", "memory_budget": int(0.52 * whole)}
    out = dkv.generate(model, params, prompts, **given, **RUN)
    assert set(out.finish_reason) == {"length"}
    assert dkv.memory_report(out.cache).pool <= 0.52 * whole
    automatic._known.clear()


def test_models_without_a_choice_are_refused():
    for changes, said in (({"max_len": 100}, "context of 100"), ({"windows": (16, 16)}, "window")):
        model, params = reading(**changes)
        for call in (dkv.fit_policy, lambda *given: dkv.generate(*given, [[1]], policy="auto")):
            with pytest.raises(ValueError, match=said):
                call(model, params)
    policy = dkv.quantized("K4V4", transform=dkv.even_channels())
    tokens = np.stack([prompt(32)])
    with pytest.raises(ValueError, match="every layer of the model has a sliding window"):
        dkv.calibrate(model, params, tokens, policy, progress=False)


def test_only_what_holds_for_any_batch_is_judged(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFKV_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv(judged.SWITCH, raising=False)
    monkeypatch.setattr(judged, "_judges", [asked])
    one_each = dkv.diffkv((((1.0,), (2.0,), (0.5,)),), 0.0)
    model, params = reading()

    def judge(policy, model=model):
        judged.judge(model, params, policy, None, strict=True, stacklevel=1)

    judge(one_each)
    judge(dkv.h2o("1MiB"))
    judge(dkv.diffkv(1, 0), reading(windows=(16, 16))[0])
    with pytest.raises(Asked):
        judge(dkv.diffkv(1, 0))


def test_another_calibration_is_judged_anew_and_another_name_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFKV_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv(judged.SWITCH, raising=False)
    costs = []
    monkeypatch.setattr(judged, "_judges", [lambda *given: costs.append(0.5) or 0.01])
    model, params = reading()
    policy = dkv.quantized("K4V4", transform=dkv.Centered())
    means = np.zeros((2, 1, 64), np.float32)
    for offset in (0.0, 1.0, 0.0):
        maps = (means + offset, means)
        learned = dkv.Calibration(((None, None),), policy.tiers, policy.transform, "a", maps)
        judged.judge(model, params, policy, learned, strict=True, stacklevel=1)
    assert len(costs) == 2
    named = dataclasses.replace(policy, name="mine")
    judged.judge(model, params, named, learned, strict=True, stacklevel=1)
    assert len(costs) == 2


def test_a_budget_below_what_stays_exact_is_refused_at_once():
    model, params = reading(windows=(200, None))
    with pytest.raises(ValueError, match=r"no policy fits into 1.00% .* at context=1000"):
        dkv.fit_policy(model, params, share=0.01, context=1000)
    with pytest.raises(ValueError, match="Raise the budget"):
        dkv.generate(model, params, [[1]], policy="auto", memory_budget="1KiB")


def test_bytes_of_latents_are_foreseen():
    model, params = tiny_latent_model()
    policy, texts = dkv.quantized("K8V8", window=16, flush=8), prompt(140)[None]
    _, cache = teacher_forced(model, params, texts, 130, policy, max_len=256)
    report = dkv.memory_report(cache)
    whole = report.allocated_bytes.sum() / report.bf16_bytes.sum()
    assert share_at(cache, slice(0, 1), 140) == pytest.approx(whole, rel=0.06)


def test_models_with_a_short_context_are_not_judged(monkeypatch):
    from diffkv_jax.fitting.judge import mean_kl

    assert mean_kl(*reading(max_len=256), dkv.quantized("K2V2"), None) == 0
