"""`diffkv convert`, `inspect`, `bench` and `serve` on a tiny model."""

import json
import sys
from types import SimpleNamespace

import pytest

from diffkv_jax.commands import bench
from diffkv_jax.models import load_pretrained
from diffkv_jax.serving import Engine
from helpers_model import same_trees
from helpers_tokenizer import loaded_once


def test_convert_writes_a_checkpoint(diffkv, model, tmp_path):
    out = tmp_path / "out"
    said = diffkv("convert", out, "--dtype", "bfloat16", policy=None)
    assert said.exit_code == 0 and said.stdout == f"wrote {out}\n"
    assert same_trees(load_pretrained(model, "bfloat16").params, load_pretrained(out).params)
    again = diffkv("convert", out, policy=None)
    assert again.exit_code == 2 and "must be empty or absent" in again.stderr
    assert diffkv("convert", out, "--overwrite", policy=None).exit_code == 0


def test_inspect_as_json_is_the_report(diffkv, monkeypatch):
    import numpy as np

    from diffkv_jax.fitting.inspect import ModelReport

    numbers = [np.array([i, i + 0.5]) for i in range(4)]
    report = ModelReport(np.arange(2), *numbers, mean_kl={"K4V4": 0.25}, context=64)
    asked = []
    monkeypatch.setattr(
        "diffkv_jax.fitting.inspect.inspect_model", lambda *given: asked.append(given) or report
    )
    found = json.loads(diffkv("inspect", "--json", policy=None).stdout)
    assert found["layers"] == [0, 1] and found["value_offset"] == [3, 3.5]
    assert found["mean_kl"] == {"K4V4": 0.25} and found["context"] == 64
    ((loaded, params),) = asked
    assert loaded.attention.num_layers == 2 and "layers" in params
    shown = diffkv("inspect", policy=None).stdout
    assert "K4V4" in shown and "0.2500" in shown


@pytest.mark.slow
def test_inspect_measures(diffkv):
    found = json.loads(diffkv("inspect", "--json", policy=None).stdout)
    assert found["layers"] == [0, 1] and found["mean_kl"]["K8V4, Exact()"] >= 0


@pytest.mark.slow
def test_bench_compares_two_caches_in_one_budget(diffkv):
    sizes = ("--requests", 6, "--prompt-tokens", 96, "--new-tokens", 40)  # no step has so many
    policy = 'quantized("K4V2", window=16, flush=8, transform=Exact())'
    said = diffkv("bench", *sizes, "--json", policy=policy)
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    full, small = found["caches"]
    assert (full["cache"], small["cache"]) == ("full", policy)
    budget = int(found["memory_budget"])
    for one in (full, small):
        assert one["finish_reasons"] == ["length"] * 6
        assert 0 < one["held_bytes"] <= one["pool_bytes"] <= 1.1 * budget
        assert 0 < one["first_token_seconds"] < one["seconds"]
        assert one["tokens_per_second"] == pytest.approx(240 / one["seconds"])
        assert 1 <= one["at_once"] <= 6
    assert small["at_once"] >= full["at_once"]
    held = [one["held_bytes"] / one["bf16_bytes"] for one in (full, small)]
    assert held[1] < held[0]


def test_bench_refuses_a_model_without_the_text(diffkv, model, monkeypatch):
    loaded = loaded_once(model, "auto")
    silent = loaded._replace(model=loaded.model.clone(text=None))
    monkeypatch.setattr("diffkv_jax.models.load_pretrained", lambda *given: silent)
    said = diffkv("bench", "--requests", 1)
    assert said.exit_code == 2 and "no calibration text" in said.stderr


@pytest.fixture
def server(monkeypatch):
    calls = []

    def serve(engine, **options):
        calls.append((engine, options))

    monkeypatch.setitem(sys.modules, "diffkv_jax.server", SimpleNamespace(serve=serve))
    return calls


def test_serve_makes_the_engine_and_calls_the_server(diffkv, model, server):
    said = diffkv(
        *("serve", "--max-requests", 3, "--max-len", 256, "--prefill-chunk", 64),
        *("--memory-budget", "2MiB", "--port", 8123, "--max-queue", 5, "--timeout", 9.5),
        "--no-warm-up",
        env={"DIFFKV_API_KEY": "secret"},
    )
    assert said.exit_code == 0, said.output
    ((engine, options),) = server
    assert options == {
        "host": "127.0.0.1",
        "port": 8123,
        "model_name": model.rsplit("/", 1)[1],
        "api_key": "secret",
        "max_queue": 5,
        "timeout_seconds": 9.5,
    }
    assert (engine.max_len, engine.prefill_chunk) == (256, 64)
    assert engine._scheduler.slots.most == 3
    request = engine.submit("the cat", max_new_tokens=2)
    list(engine.run())
    assert request.text is not None and len(request.tokens) == 2


def test_serve_leaves_what_is_not_given_to_the_server(diffkv, server, monkeypatch):
    warmed = []
    monkeypatch.setattr(Engine, "warm_up", lambda _: warmed.append(True))
    said = diffkv("serve", "--max-requests", 1, "--max-len", 64, "--model-name", "cat")
    assert said.exit_code == 0, said.output
    ((_, options),) = server
    assert options == {
        "host": "127.0.0.1",
        "port": 8000,
        "model_name": "cat",
        "api_key": None,
    }
    assert len(warmed) == 1


def test_serve_without_its_extra_says_how_to_install_it(diffkv, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffkv_jax.server", None)  # importing it fails
    said = diffkv("serve")
    assert said.exit_code == 2 and "pip install 'diffkv-jax[serve]'" in said.stderr


def test_the_table_of_a_benchmark(capsys):
    sizes = {"at_once": 3, "tokens_per_second": 12.34, "first_token_seconds": 0.5, "seconds": 9.0}
    held = {"held_bytes": 2**20, "bf16_bytes": 2**22, "pool_bytes": 2**21}
    one = bench.Measured("none", **sizes, **held, finish_reasons=("length",))
    unseen = bench.Measured("other", **sizes, **dict.fromkeys(held), finish_reasons=("length",))
    bench._show([one, unseen], "title")
    lines = capsys.readouterr().out.splitlines()
    (first,) = (line for line in lines if "none" in line)
    assert all(part in first for part in ("3", "12.3", "0.50 s", "1.0 MiB", "25%"))
    (second,) = (line for line in lines if "other" in line)
    assert "-" in second and "MiB" not in second
