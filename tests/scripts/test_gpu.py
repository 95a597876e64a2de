"""The GPU benchmark's own machinery, and all of its sections in the interpreter."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks.common.report import FAILED, LATE, OK, Section
from benchmarks.common.states import hashed, layer_tables, pages_of, random_pages
from benchmarks.common.timing import Effort, FreshRunner, Looped, interleaved
from benchmarks.gpu import command
from benchmarks.kernels.attention import attended_bytes
from benchmarks.kernels.command import setting_of
from benchmarks.kernels.correct import distance, verdict
from benchmarks.kernels.correct_event import event_state
from diffkv_jax.testing.readback import check_pool, read_tier

TINY = setting_of(tiny=True)


def test_a_comparison_fails_on_zeros_and_nan_and_changed_rubbish():
    wanted = np.array([1.0, -2.0, np.nan])
    live = ~np.isnan(wanted)
    assert distance(wanted, wanted, live) == 0
    assert distance(np.array([0, 0, np.nan]), wanted, live) == pytest.approx(1)
    assert distance(np.array([1, -2, 0.0]), wanted, live) == math.inf
    assert distance(np.array([1, np.nan, np.nan]), wanted, live) == math.inf
    assert distance(wanted[:2], wanted, live) == math.inf
    assert verdict(1.0, 1e-2)["status"] == verdict(math.nan, 1e-2)["status"] == FAILED
    assert verdict(0.0, 0.0)["status"] == OK


def test_a_row_that_raises_or_is_late_does_not_stop_the_table():
    table = Section("title", {"name": "", "x": ".1f"}, seconds=1e9)
    assert not table.measure({"name": "raises"}, lambda: 1 / 0)
    assert table.measure({"name": "fine"}, lambda: {"x": 1.25})
    table.seconds = -1
    assert not table.measure({"name": "late"}, lambda: {"x": 2.0})
    assert [row["status"].split(":")[0] for row in table.rows] == [FAILED, OK, LATE]
    assert table.failed and table.table().row_count == 3


def test_steps_are_counted_and_fresh_states_stay_fresh():
    """The loop makes `repeats` steps a call; a competitor that uses its state up starts from the
    same one each time.
    """
    looped = Looped(lambda state, one: state + one, repeats=5, steps=2)
    runner = looped.on(jnp.zeros(()), jnp.ones(()))
    runner.run(3)
    assert float(runner.state) == 15 and looped.steps == 10
    fresh = FreshRunner(Looped(lambda state, one: state + one), jnp.zeros(()), (jnp.ones(()),))
    times = interleaved(
        {"a": looped.on(jnp.zeros(()), jnp.ones(())), "b": fresh}, Effort(3, 1e-4, 1)
    )
    assert float(fresh.state) == 0
    assert all(0 < t.least <= t.median <= t.largest for t in times.values())


@pytest.mark.parametrize("tiers, lengths", [(("K8V4", "K4V2"), (70, 40)), (("full",), (70,))])
def test_random_caches_hold_what_they_say(tiers, lengths):
    """Tables name each page once; every stored token is finite and not all alike."""
    layout = TINY.layout(tiers, 256)
    num_pages = 2 * 3 * pages_of(layout, lengths) + 4
    tables, free = layer_tables(
        layout, lengths, heads=3, layers=2, num_pages=num_pages, max_len=256
    )
    pages = random_pages(layout, num_pages, 256)
    used = np.concatenate([table[table < num_pages] for table in tables])
    assert len(free) == 4 and sorted([*used, *free]) == list(range(num_pages))
    for tier, n in enumerate(lengths):
        tokens = read_tier(pages, layout, tables[1][2], tier, n)
        for x in (tokens.k, tokens.v):
            assert (
                x.shape == (n, 64)
                and np.isfinite(x).all()
                and 0.01 < x.std() < 3
                and np.abs(x).max() < 8
            )
    per_token = [fmt.token_bytes(64) + (8 if layout.scored else 0) for fmt in layout.formats]
    assert attended_bytes(TINY, layout, lengths, 3) == 3 * (
        np.dot(per_token, lengths) + 20 * 2 * 64 * 2
    )


def test_random_bits_are_spread():
    bits = np.asarray(hashed((64, 64, 32), 0) >> 24)
    counts = np.bincount(bits.ravel(), minlength=256)
    assert counts.min() > 0.7 * counts.mean() and counts.max() < 1.3 * counts.mean()
    assert (bits[0] != bits[1]).mean() > 0.9 and (
        np.asarray(hashed((64, 64, 32), 1) >> 24) != bits
    ).mean() > 0.9


def test_the_state_of_an_event_keeps_the_invariants():
    layout = TINY.layout(("K8V4", "K4V2"), 256)
    stored = event_state(layout, [(0, 0), (33, 65), (90, 3)], 256)
    check_pool(layout, stored.page_table, stored.tier_len, stored.ring)


@pytest.mark.parametrize("arguments", [["--only", "speed"], ["--model-scale", "70b"], []])
def test_arguments_are_refused_with_the_choices(arguments):
    """The last: no GPU here."""
    result = _runner().invoke(_app(), arguments)
    assert result.exit_code == 2 and any(
        word in result.output for word in ("correctness", "8b", "--tiny")
    )


@pytest.mark.slow
@pytest.mark.long
def test_tiny_runs_every_section(tmp_path):
    path = tmp_path / "all.json"
    result = _runner().invoke(_app(), ["--tiny", "--json", str(path), "--seconds", "100"])
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert (
        set(written["sections"])
        == {"correctness", "bandwidth", "attention", "operations", "serving"}
        and "cpu" in written["device"]
    )
    rows = [row for section in written["sections"].values() for row in section["rows"]]
    assert len(rows) > 25 and all(row["status"] == OK for row in rows)
    few, same, more = written["sections"]["serving"]["rows"]
    assert (
        few["requests"] == same["requests"] == few["finished"] < more["requests"]
        and same["MiB a request"] < few["MiB a request"]
    )


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(command.main)
    return app


def _runner() -> CliRunner:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
