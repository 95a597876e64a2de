"""`fit_policy`, "auto" and the warning of policies that collapse, on tiny seeded models."""

import dataclasses
import json
import warnings
from functools import lru_cache

import jax
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.calibration.calibration import fingerprint
from diffkv_jax.calibration.sample_text import SampleText
from diffkv_jax.choice import automatic, judged
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.fitting.measure import Bench, learned, share_at
from diffkv_jax.fitting.texts import GOES_ON, LEAST, REPEATS, STEPS, joined, split
from diffkv_jax.testing.tiny import prompt, tiny_latent_model, tiny_model

TEXTS = np.stack([prompt(LEAST + STEPS + 8, seed) for seed in range(4)])
QUICK = {"context": 1024, "progress": False}


def biased(change):
    """A tiny model with what `change` makes of random key biases float32 [layers, kv_heads, 32]."""
    model, params = tiny_model(model_type="qwen2", q_heads=4, kv_heads=2, head_dim=32, max_len=2048)
    params = jax.tree.map(lambda x: x, params)  # dictionaries of its own
    attention = params["layers"]["self_attn"]
    bias = 0.1 * jax.random.normal(jax.random.key(1), (2, 2, 32))
    attention["k_proj"]["bias"] = change(bias).reshape(attention["k_proj"]["bias"].shape)
    return model, params


def slow_pair(bias):
    """The last pair of channels turns slowest, so that its bias stays an offset of all keys."""
    return bias.at[..., 15].add(30.0).at[..., 31].add(-30.0)


def by_hand(model, params) -> dkv.FittedPolicy:
    """One that nothing was measured for."""
    report = dkv.FitReport(0.01, 0.001, 0.01, 0.01, 0.9, 0.8, 0.8, 0.3, 1024, 256, 2, 0.01)
    policy = dkv.diffkv(1.0, 0.0, window=16, flush=8)
    return dkv.FittedPolicy(policy, None, report, fingerprint(model, params), {"share": 0.3})


@lru_cache
def fitted() -> dkv.FittedPolicy:
    model, params = tiny_model()
    return dkv.fit_policy(model, params, TEXTS, share=0.5, **QUICK)


def test_texts_go_on_and_repeat():
    rows = np.arange(4 * 300).reshape(4, 300)
    fit, others = split(rows, LEAST, 2)
    assert len(fit.rows) == 2 and len(others.rows) == 2
    every = np.concatenate([fit.rows, others.rows])
    assert sorted(every[:, 0]) == [0, 300, 600, 900]
    for row in every:
        body, again = row[: LEAST + GOES_ON + 1], row[LEAST + GOES_ON + 1 :]
        assert (np.diff(body) == 1).all() and (np.diff(again) == 1).all()
        assert len(again) == REPEATS and set(again) <= set(body[:LEAST])
    assert fit.next_tokens.shape == (2, STEPS)
    assert (fit.fed[:, LEAST + 1 :] == fit.next_tokens[:, :-1]).all()
    with pytest.raises(ValueError, match="more text"):
        split(rows[:1], LEAST, 2)


@pytest.mark.slow
def test_share_is_that_of_the_cache():
    """Told for the length that was measured, it is what `memory_report` counts."""
    model, params = tiny_model(kv_heads=1)
    texts = np.stack([prompt(1024, seed) for seed in range(3)])
    for policy in (dkv.diffkv(1.0, 0.0), dkv.diffkv(1.0, 0.5), dkv.quantized("K4V4")):
        _, cache = teacher_forced(model, params, texts[:, :816], 800, policy, max_len=832)
        report = dkv.memory_report(cache)
        whole = report.allocated_bytes.sum() / report.bf16_bytes.sum()
        assert share_at(cache, slice(0, 3), 816) == pytest.approx(whole, rel=0.06), policy


@pytest.mark.slow
def test_meets_its_share_and_reports_on_other_text():
    found = fitted()
    report = found.report
    assert 0.1 < report.share <= 0.5 * 1.05
    assert report.rows == 2 and report.measured == LEAST and report.context == 1024
    assert 0 < report.kl < 5 and report.kl == pytest.approx((report.going_on + report.repeated) / 2)
    model, params = tiny_model()
    _, others = split(TEXTS, LEAST, 4)
    again = Bench(model, params, others, 1024).of(found.policy, found.calibration)
    assert again.mean_kl == pytest.approx(report.kl, rel=1e-5)
    assert "bytes" in str(found) and "recall" in str(found)


@pytest.mark.slow
@pytest.mark.long
def test_more_bytes_cost_less():
    model, params = tiny_model()
    larger = dkv.fit_policy(model, params, TEXTS, share=0.7, drop=False, **QUICK)
    assert larger.report.fitted_kl <= fitted().report.fitted_kl
    by_kl = dkv.fit_policy(
        model, params, TEXTS, target_kl=1.01 * larger.report.fitted_kl, drop=False, **QUICK
    )
    assert by_kl.report.fitted_kl <= 1.01 * larger.report.fitted_kl
    assert by_kl.report.share <= 1.05 * larger.report.share


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_used_saved_and_refused(tmp_path, whole):
    model, params = tiny_model()
    found = fitted() if whole else by_hand(model, params)
    found.save(tmp_path / "fit")
    again = dkv.FittedPolicy.load(tmp_path / "fit")
    assert again.policy.to_json() == found.policy.to_json() and again.report == found.report
    out = dkv.generate(model, params, TEXTS[:, :100], policy=again, max_new_tokens=4)
    calibration = found.calibration
    same = dkv.generate(
        model,
        params,
        TEXTS[:, :100],
        policy=found.policy,
        calibration=calibration,
        max_new_tokens=4,
    )
    assert (np.asarray(out.tokens) == np.asarray(same.tokens)).all()
    dkv.make_cache(model, found, [100])
    with pytest.raises(ValueError, match="not there yet"):
        found.save(tmp_path / "fit")
    other, weights = tiny_model(seed=1)
    with pytest.raises(ValueError, match="another model"):
        dkv.generate(other, weights, TEXTS[:, :100], policy=found, max_new_tokens=1)
    if calibration is not None:
        with pytest.raises(ValueError, match="leave calibration= out"):
            dkv.generate(model, params, TEXTS, policy=found, calibration=calibration)
    file = tmp_path / "fit" / "fitted_policy.json"
    good = json.loads(file.read_text())
    damaged = ({"goal": None}, {"fingerprint": 5}, {"report": {**good["report"], "kl": "small"}})
    for text in ("{}", "[]", "{", *(json.dumps(good | wrong) for wrong in damaged)):
        file.write_text(text)
        with pytest.raises(ValueError, match="fit again"):
            dkv.FittedPolicy.load(tmp_path / "fit")
    if calibration is None:
        with pytest.raises(ValueError, match="leave calibration= out"):
            dkv.make_cache(model, found, [100], calibration=object())


def test_what_cannot_be_is_refused():
    model, params = tiny_model()
    for wrong, said in (
        ({"share": 0.5, "target_kl": 0.1}, "take one"),
        ({"context": 10}, "context=10"),
        ({"requests": 0}, "requests=0"),
    ):
        with pytest.raises(ValueError, match=said):
            dkv.fit_policy(model, params, TEXTS, **{**QUICK, **wrong})
    with pytest.raises(ValueError, match="at least"):
        dkv.fit_policy(model, params, TEXTS[:, :100], **QUICK)
    with pytest.raises(ValueError, match="give tokens="):
        dkv.fit_policy(model, params, **QUICK)


@pytest.mark.slow
def test_out_of_reach():
    with pytest.raises(ValueError, match="no policy fits into"):
        dkv.fit_policy(*tiny_model(), TEXTS, share=0.01, **QUICK)
    with pytest.raises(ValueError, match="no policy keeps the mean KL below"):
        dkv.fit_policy(*tiny_model(), TEXTS, target_kl=1e-9, **QUICK)


@pytest.mark.slow
@pytest.mark.long
def test_latent_models_can_be_fitted():
    model, params = tiny_latent_model()
    found = dkv.fit_policy(model, params, TEXTS, share=0.9, **QUICK)
    assert found.policy.tiers == ("K8V8", "K4nV4n") and found.report.share <= 0.95


def reading(seed: int = 0):
    model, params = tiny_model(seed=seed)
    return model.clone(text=SampleText(prompt(2400, 1), prompt(0))), params


@pytest.fixture
def folder(monkeypatch, tmp_path):
    for module in (automatic, judged):
        monkeypatch.setattr(module, "cache_directory", lambda: tmp_path)
        module._known.clear()
    judged._warned.clear()
    monkeypatch.delenv(judged.SWITCH, raising=False)
    yield tmp_path
    automatic._known.clear()
    judged._known.clear()


def test_auto_is_fitted_once_and_kept(folder, monkeypatch):
    model, params = reading()
    fits = []

    def fit(model, params, **goal):
        fits.append(goal)
        return by_hand(model, params)

    monkeypatch.setattr(automatic, "_fits", [fit])
    run = {"max_new_tokens": 2}
    for policy in ("auto", dkv.AutoPolicy(), "auto"):
        out = dkv.generate(model, params, [prompt(80)], policy=policy, **run)
        assert out.cache.policy.tiers == ("K8V4", "K4V2")
    assert len(fits) == 1
    automatic._known.clear()  # another process
    dkv.generate(model, params, [prompt(90)], policy="auto", **run)
    assert len(fits) == 1
    teacher_forced(model, params, prompt(80)[None], 70, dkv.AutoPolicy(share=0.5))
    dkv.generate(model, params, [prompt(80)], policy="auto", memory_budget="2MiB", **run)
    assert [goal.get("share") for goal in fits] == [None, 0.5, None]
    assert fits[2]["memory_budget"] == int(0.9 * 2**21) and fits[2]["context"] == 256
    with pytest.raises(ValueError, match="two goals"):
        dkv.AutoPolicy(share=0.5, target_kl=0.1)
    with pytest.raises(ValueError, match="target_kl"):
        dkv.AutoPolicy(target_kl="huge")
    with pytest.raises(ValueError, match="fit_policy"):
        dkv.generate(*tiny_model(), [prompt(80)], policy="auto")


@pytest.mark.slow
def test_auto_end_to_end(folder):
    model, params = reading()
    out = dkv.generate(model, params, [prompt(300)], policy=dkv.AutoPolicy(share=0.7), **RUN)
    kept = list((folder / "policies").iterdir())
    assert len(kept) == 1 and int(out.lengths[0]) == 2
    assert json.loads((kept[0] / "fitted_policy.json").read_text())["goal"] == {"share": 0.7}


RUN = {"max_new_tokens": 2}


@pytest.mark.slow
def test_a_policy_that_collapses_warns_once(folder):
    model, params = reading()
    bad = dkv.quantized("K2V2", transform=dkv.Exact())
    with pytest.warns(UserWarning, match="mean KL of .* policy='auto'") as seen:
        dkv.generate(model, params, [prompt(80)], policy=bad, **RUN)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dkv.generate(model, params, [prompt(80)], policy=bad, **RUN)  # once
        dkv.generate(model, params, [prompt(80)], policy=dkv.quantized("K8V8"), **RUN)
        dkv.generate(model, params, [prompt(80)], policy=None, **RUN)
        other = dataclasses.replace(bad, schedule=dkv.Schedule(window=32))
        dkv.generate(model, params, [prompt(80)], policy=other, strict=None, **RUN)
    assert len(list((folder / "judged").iterdir())) == 2
    with pytest.raises(ValueError, match="mean KL"):
        dkv.generate(model, params, [prompt(80)], policy=bad, strict=True, **RUN)
    with pytest.raises(TypeError, match="strict"):
        dkv.generate(model, params, [prompt(80)], policy=bad, strict="yes", **RUN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dkv.generate(*tiny_model(), [prompt(80)], policy=bad, **RUN)  # has no text


@pytest.mark.slow
def test_inspect_model_sees_offsets():
    plain, offset = (dkv.inspect_model(*biased(x), TEXTS) for x in (lambda bias: bias, slow_pair))
    assert plain.key_offset.max() < 8 < 12 < offset.key_offset.max()
    assert (offset.value_offset < 8).all() and offset.layers.tolist() == [0, 1]
    assert offset.mean_kl["K4V4, Exact()"] > 5 * plain.mean_kl["K4V4, Exact()"]
    assert offset.mean_kl["K4V4"] < 2 * plain.mean_kl["K4V4"] + 1e-3
    text = str(offset)
    assert "key offset" in text and "Exact()" in text and "K8V4" in text


@pytest.mark.slow
def test_large_key_biases_do_not_matter_with_a_learned_map():
    """Layer 0's key biases times 100: with the map of a fit twice the KL at most, without more."""
    texts = np.stack([prompt(330, seed) for seed in range(6)])
    fit, others = split(texts, 256, 3)
    mapped = dkv.Chain((dkv.Centered(), dkv.Learned()))
    policies = dkv.diffkv(1.0, 0.0, transform=mapped), dkv.quantized("K4V4")
    found = []
    for scale in (1.0, 100.0):
        model, params = biased(lambda bias, scale=scale: bias.at[0].multiply(scale))
        bench = Bench(model, params, others, 1024)
        found.append([bench.of(one, learned(model, params, fit, one)).mean_kl for one in policies])
    (protected, open_), (protected_after, open_after) = found
    assert protected_after < 2 * protected
    assert open_after > 3 * open_


def test_texts_one_behind_the_other():
    rows = np.arange(3 * 300).reshape(3, 300)
    fit = split(np.concatenate([rows, rows + 900]), LEAST, 3)[0]
    assert joined(fit, 2 * LEAST - 1) is fit
    longer = joined(fit, 2 * LEAST + 5)
    assert longer.context == 2 * LEAST and longer.rows.shape == (3, 2 * LEAST + STEPS + 1)
    for i, row in enumerate(longer.rows):
        first, second = fit.rows[i], fit.rows[(i + 1) % 3]
        assert (row[:LEAST] == first[:LEAST]).all()
        assert (row[LEAST : 2 * LEAST + GOES_ON + 1] == second[: LEAST + GOES_ON + 1]).all()
        assert set(row[-REPEATS:]) <= set(first[:LEAST])
    assert joined(fit, 100 * LEAST).context == 3 * LEAST
