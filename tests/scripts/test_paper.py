"""The benchmark of the paper's claims: its policies and tables, and what its command refuses."""

import numpy as np
import typer
from pytest import mark, raises

import diffkv_jax as dkv
from benchmarks.paper.claims import CLAIMS, static, table
from benchmarks.paper.command import main
from benchmarks.paper.setting import Row, Setting
from diffkv_jax.fitting.measure import Bench
from diffkv_jax.fitting.texts import STEPS, Texts
from diffkv_jax.testing.tiny import prompt, tiny_model


@mark.slow
def test_every_head_keeps_the_same_share():
    """And thresholds, which they are held against, do not."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    rows = np.stack([prompt(200 + STEPS + 1, seed) for seed in range(2)])
    setting = Setting.__new__(Setting)
    setting.model, setting.params, setting.texts = model, params, Texts(rows, 200)
    setting.bench = Bench(model, params, setting.texts, 200, replays=True)
    exact = {"transform": dkv.Exact()}
    plain = dkv.CompressionPolicy.from_json(static(0.7).to_json())
    kept = setting.bench.of(plain, None).by_head.sum(axis=-1)
    assert kept.max() - kept.min() < 0.02 and abs(kept.mean() - 0.7) < 0.1
    dynamic = setting.bench.of(dkv.diffkv(0.8, 0.8, tiers=("K8V8",), **exact), None)
    uneven = dynamic.by_head.sum(axis=-1)
    assert uneven.max() - uneven.min() > 0.02
    row = setting.row("thresholds", dkv.diffkv(0.8, 0.8, tiers=("K8V8",), **exact))
    assert row.kl == dynamic.kl.mean() and abs(sum(row.kept) - uneven.mean()) < 1e-9


def test_a_table():
    row = Row("x", 0.01234, 0.001, 0.3456, (0.5, 0.25))
    assert table([row]).splitlines()[2] == "| x | 0.0123 ± 0.0010 | 0.346 | 0.50 / 0.25 |"


def test_an_unknown_claim_is_refused_before_anything_is_loaded():
    with raises(typer.BadParameter, match="key"):
        main(claim=["key"])
    assert "keys" in CLAIMS
