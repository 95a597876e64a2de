"""The benchmark's own machinery: ratios, the file that runs add to, tables, workers that fail, and
our adapter on a tiny model.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import diffkv_jax as dkv
from benchmarks.peers import command, grid as sections
from benchmarks.peers.llama import for_streams
from benchmarks.peers.ours import Ours, _decode, replicate, spare_pages, used_pages
from benchmarks.peers.results import OK, Entry, Results, ratio, table
from benchmarks.peers.systems import SYSTEMS, Decoded, Place, chosen, log_softmax
from benchmarks.peers.worker import Reply, Worker, WorkerError, answered
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.tiny import prompt, tiny_model

CELL = {"context": 512, "batch": 1}
FACTS = {"ms a step": 10.0, "KV MiB": 1.0, "KV bytes a token": 100.0, "peak MiB": 5.0}


def entry(system: str, samples: list[float], run: str = "a", **changes) -> Entry:
    return Entry(
        **(
            {
                "section": "decode",
                "labels": CELL,
                "system": system,
                "run": run,
                "samples": samples,
                "facts": FACTS,
            }
            | changes
        )
    )


def test_ratios_are_of_one_round_of_one_run():
    """The machine was three times slower in the last round, for both: that is no spread."""
    one, two = entry("one", [10.0, 20.0, 5.0]), entry("two", [5.0, 10.0, 2.5])
    found = ratio(one, two)
    assert found is not None and (found.least, found.median, found.largest) == (2, 2, 2)
    assert str(ratio(entry("one", [10.0, 20.0, 10.0]), two)) == "2.00 (2.00 to 4.00)"
    assert ratio(one, entry("two", [5.0, 10.0, 2.5], run="b")) is None
    assert ratio(one, entry("two", [5.0, 10.0])) is None and ratio(one, None) is None


def test_runs_add_to_one_file(tmp_path):
    """A later result replaces an earlier one, a failure does not; a run is kept while an entry
    refers to it.
    """
    path = tmp_path / "results.json"
    first = Results(path)
    first.runs |= {"a": {"load": "0"}}
    first.add(entry("ours-full", [1.0]))
    first.add(entry("ours-diffkv", [], status="broke"))
    second = Results(path)
    second.runs |= {"b": {"load": "1"}}
    second.add(entry("ours-full", [], run="b", status="broke"))
    assert "b" not in json.loads(path.read_text())["runs"]
    second.add(entry("ours-diffkv", [2.0], run="b"))
    second.add(entry("ours-diffkv", [3.0], run="b", labels=CELL | {"batch": 8}))
    last = Results(path)
    assert set(last.runs) == {"a", "b"} and len(last.entries) == 3
    assert [(e.system, e.samples, e.status) for e in last.of("decode")] == [
        ("ours-full", [1.0], OK),
        ("ours-diffkv", [2.0], OK),
        ("ours-diffkv", [3.0], OK),
    ]
    last.add(entry("ours-full", [4.0], run="b"))
    assert set(json.loads(path.read_text())["runs"]) == {"b"}


def test_a_table_has_every_system_and_its_reason():
    results = Results()
    for each in (
        entry("base", [10.0, 12.0]),
        entry("fast", [30.0, 24.0]),
        entry("old", [9.0, 9.0], run="b"),
        entry("gone", [], status="No|module"),
    ):
        results.add(each)
    titles = {"gone": "Gone", "fast": "Fast", "base": "Base", "old": "Old"}
    lines = table(results, "decode", titles, ["base", "absent"]).splitlines()
    assert lines[2].endswith("| of Base |") and len({line.count("|") for line in lines[2:]}) == 1
    assert [line.split("|")[3].strip() for line in lines[4:]] == ["Gone", "Fast", "Base", "Old"]
    assert (
        "none: No/module" in lines[4]
        and "27.0 (24.0 to 30.0)" in lines[5]
        and "2.50 (2.00 to 3.00)" in lines[5]
        and "other run" in lines[7]
    )
    assert table(results, "prefill", titles, []) == ""


def test_systems_are_chosen_by_patterns_and_have_full_counterparts():
    assert chosen("ours-full,llama-q?") == ["ours-full", "llama-q8", "llama-q4"]
    with pytest.raises(ValueError, match="vllm"):
        chosen("ours-*,vllm")
    assert all(
        one.counterpart is None or SYSTEMS[one.counterpart].counterpart is None
        for one in SYSTEMS.values()
    )


class Scripted:
    """Stands for a worker: seconds of `decode` are given, a text is an error."""

    def __init__(self, *seconds):
        self.seconds, self.closed = list(seconds), False

    def call(self, method, *arguments):
        if method == "keep":
            return Reply(None, 1)
        value = self.seconds.pop(0)
        if isinstance(value, str):
            raise WorkerError(value)
        return Reply(Decoded(value, 2**20), 3 * 2**20)

    def close(self):
        self.closed = True


def grid(workers: dict, **changes) -> sections.Run:
    def start(name):
        if workers[name] is None:
            raise WorkerError("ModuleNotFoundError: No module named 'llama_cpp'")
        return workers[name]

    options = {"contexts": [96], "batches": [2], "rounds": 2, "steps": 4, "work": Path()} | changes
    return sections.Run(
        "now",
        Results(),
        start,
        list(workers),
        {"king_james": np.arange(200)},
        ["king_james"],
        **options,
    )


def test_a_peer_that_is_missing_or_fails_is_reported_and_the_warm_up_left_out(capsys):
    workers = {
        "ours-full": Scripted(9.0, 1.0, 2.0),
        "quanto-4bit": Scripted(9.0, 1.0, "out of memory"),
        "llama-q8": None,
    }
    run = grid(workers)
    run.open()
    sections.decode(run)
    run.close()
    found = {e.system: e for e in run.results.of("decode")}
    assert found["ours-full"].samples == [8.0, 4.0] and found["ours-full"].facts["peak MiB"] == 3
    assert (
        found["quanto-4bit"].status == "out of memory" and "No module" in found["llama-q8"].status
    )
    assert workers["ours-full"].closed and "No module" in capsys.readouterr().out


def test_nothing_is_begun_after_the_deadline():
    run = grid({"ours-full": Scripted()}, deadline=0.0)
    sections.decode(run)
    assert "time" in run.results.of("decode")[0].status


def test_a_worker_answers_errors_and_reports_its_peak():
    reply = answered(lambda: np.ones(2**22).sum())
    assert reply.value == 2**22 and reply.error is None and reply.peak_bytes > 2**25
    assert answered(lambda: 1 / 0).error == "ZeroDivisionError: division by zero"


@pytest.mark.slow
def test_a_process_that_cannot_load_says_why(tmp_path):
    """A real worker process: the file is no model."""
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    with pytest.raises(WorkerError, match="GGUF"):
        Worker("ours-full", tmp_path / "no.gguf", tmp_path, 1)


def test_log_softmax_and_llama_states():
    rows = np.random.default_rng(0).normal(size=(3, 50)) * 20
    np.testing.assert_allclose(log_softmax(list(rows)), jax.nn.log_softmax(rows), atol=1e-5)
    state = np.array([7, 7, 1, 5, 11, 12], "<u4").tobytes()
    assert np.frombuffer(for_streams(state, 3, 5), "<u4").tolist() == [7, 7, 3, 5, 11, 12, 0, 0]
    with pytest.raises(RuntimeError, match="one stream"):
        for_streams(state, 3, 6)


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """Ours on a tiny model, full and compressed, each with a prompt in its cache."""
    place = Place(Path("none.gguf"), tmp_path_factory.mktemp("work"), 1)
    made = {
        name: Ours(place, name, implementation="xla", loaded=tiny_model())
        for name in ("none", "diffkv")
    }
    for ours in made.values():
        ours.keep(prompt(128))
    return made


@pytest.mark.slow
@pytest.mark.long
def test_copies_of_a_request_write_what_it_writes_alone(systems):
    """The pages are copied: shifting them changes the text."""
    ours = systems["diffkv"]
    run = {
        "policy": ours.policy,
        "max_len": ours.kept.spec.max_len,
        "prefill_chunk": 128,
        "implementation": "xla",
    }
    alone = dkv.generate(
        ours.model, ours.params, prompt(128)[None], max_new_tokens=41, **run
    ).tokens[0, 1:]
    first = jnp.full(2, ours.first, jnp.int32)
    cache = replicate(ours.kept, 2, spare_pages(ours.kept, 40))
    table = np.asarray(cache.stored.page_table)
    assert len(np.unique(table[table < cache.spec.num_pages])) == 2 * len(used_pages(ours.kept))
    out, cache = _decode(ours.model, ours.params, cache, first, 40)
    np.testing.assert_array_equal(np.asarray(out).T, [alone, alone])
    assert not np.asarray(cache.counters.overflow).any()
    broken = replicate(ours.kept, 2, spare_pages(ours.kept, 40))
    rolled = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), broken.stored.pages)
    broken = with_part(broken, "stored.pages", rolled)
    assert (np.asarray(_decode(ours.model, ours.params, broken, first, 40)[0]).T != alone).any()


@pytest.mark.slow
def test_a_budget_takes_as_many_requests_as_its_bytes(systems):
    """Bytes are those of the arrays; more requests fit when they are compressed."""
    decoded = systems["diffkv"].decode(2, 40)
    assert decoded.seconds > 0 and systems["diffkv"].prefill(prompt(128)[None]) > 0
    assert (
        systems["diffkv"].fits(decoded.kv_bytes, 40) == 2
        and systems["diffkv"].fits(decoded.kv_bytes - 1, 40) == 1
    )
    assert systems["diffkv"].fits("8MiB", 40) > systems["none"].fits("8MiB", 40) > 1
    with pytest.raises(ValueError, match="do not fit"):
        systems["diffkv"].decode(3, 40, decoded.kv_bytes)
    shares = systems["diffkv"].shares()
    assert abs(sum(value for key, value in shares.items() if key != "of bf16") - 1) < 1e-6


@pytest.mark.parametrize(
    "arguments",
    [["--only", "speed"], ["--contexts", "8192", "--steps", "32"], ["--systems", "vllm"]],
)
def test_arguments_are_refused_with_the_choices(arguments, tmp_path):
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}).invoke(
        _app(), [*arguments, "--work", str(tmp_path)]
    )
    assert result.exit_code == 2 and any(
        word in result.output for word in ("report", "leave room", "ours-full")
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_quick_run_of_ours_on_the_real_model(tmp_path):
    arguments = [
        "--quick",
        "--systems",
        "ours-full,ours-diffkv",
        "--only",
        "decode,prefill,budget,attention",
        "--budgets",
        "64",
    ]
    path = tmp_path / "out.json"
    result = CliRunner().invoke(_app(), [*arguments, "--out", str(path), "--work", str(tmp_path)])
    assert result.exit_code == 0, result.output
    entries = Results(path).entries.values()
    assert {e.section for e in entries} == {"decode", "prefill", "budget", "attention"} and all(
        e.status == OK for e in entries
    )


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(command.main)
    return app
