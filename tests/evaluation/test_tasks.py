"""Needles, retrieval, two questions and mathematics, against a model that knows the answers."""

import gzip
import json

import numpy as np
import pytest

from diffkv_jax import evaluation
from diffkv_jax.evaluation import (
    draw_records,
    gsm8k,
    key_value_retrieval,
    math500,
    needle,
    passkeys,
    read_records,
    retrieval,
    two_questions,
)
from diffkv_jax.evaluation.answers import Answers
from diffkv_jax.evaluation.math_problems import Problem
from diffkv_jax.evaluation.retrieval import records_within
from helpers_text import Characters

GIVEN = None, None, Characters()  # no model: its answers are given


def answering(monkeypatch, module: str, texts) -> list[dict]:
    """Has `answers` in a module say `texts(prompts, turns)`; what it was called with."""
    calls = []

    def answers(model, params, tokenizer, prompts, policy, *, turns=(), **options):
        calls.append({"prompts": list(prompts), "turns": [list(turn) for turn in turns], **options})
        said = texts(prompts, turns)
        return Answers(tuple(map(tuple, said)), 0.5)

    monkeypatch.setattr(f"diffkv_jax.evaluation.{module}.answers", answers)
    return calls


def test_passkeys(monkeypatch):
    tokenizer = GIVEN[2]
    text = "the quick brown fox jumps over the lazy dog " * 40

    def second_only(prompts, turns):
        return [["48213." if i == 1 else "48 213" for i in range(len(prompts))]]

    calls = answering(monkeypatch, "needle", second_only)
    found = passkeys(*GIVEN, "none", text, lengths=(200, 400), depths=3)
    assert found.scores.tolist() == [0, 1, 0] * 2
    assert [row["length"] for row in found.details] == [200] * 3 + [400] * 3
    assert [len(prompt) for call in calls for prompt in call["prompts"]] == [200] * 3 + [400] * 3
    places = [
        tokenizer.decode(prompt).index("48213") / len(prompt) for prompt in calls[1]["prompts"]
    ]
    assert np.all(np.diff(places) > 0.15)
    with pytest.raises(ValueError, match="give a longer text or another context"):
        passkeys(*GIVEN, "none", text, lengths=(4000,))
    with pytest.raises(ValueError, match="context=50 must hold needle and question"):
        needle.passkey_prompts(tokenizer, text, 50, 1)


def test_key_value_retrieval(monkeypatch):
    problems = draw_records(3, 5, seed=1)
    assert problems == draw_records(3, 5, seed=1) != draw_records(3, 5, seed=2)
    assert [one.depth() for one in problems] == [0, 0.5, 1]
    values = [one.value() for one in problems]

    def first_right(prompts, turns):
        return [[f' "{values[0]}"', problems[1].pairs[0][1], ""]]

    calls = answering(monkeypatch, "retrieval", first_right)
    found = key_value_retrieval(*GIVEN, "none", problems)
    assert found.scores.tolist() == [1, 0, 0] and found.policy == "none" and found.of_bf16 == 0.5
    assert calls[0]["turns"] == [[one.question() for one in problems]]
    assert problems[0].pairs[0][0] not in problems[0].question(1)
    key_value_retrieval(*GIVEN, "none", problems, question_after=False)
    assert calls[1]["turns"] == [] and calls[1]["prompts"][0].endswith("Corresponding value:")
    # what is asked for is in the document, and JSON
    document = problems[0].document
    assert json.loads(document[document.index("{") :])[problems[0].pairs[0][0]] == values[0]


def test_problems_of_a_file(tmp_path):
    (whole,) = draw_records(1, 9)
    row = {"ordered_kv_records": whole.pairs, "key": whole.pairs[4][0], "value": whole.pairs[4][1]}
    path = tmp_path / "kv.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    (found,) = read_records(path)
    assert found.pairs == whole.pairs and found.value() == row["value"]
    (few,) = read_records(path, 1, 3)
    assert len(few.pairs) == 3 and few.value() == row["value"] and few.question(1) != few.question()
    row["key"] = "absent"
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    with pytest.raises(ValueError, match="key='absent' must be one of two or more records"):
        read_records(path)


def test_records_make_up_the_context():
    tokenizer = GIVEN[2]
    size = records_within(tokenizer, 2000)
    one = draw_records(1, size)[0]
    assert 1500 < len(one.document + one.question()) + retrieval.ANSWER <= 2000
    with pytest.raises(ValueError, match="context=100 must be at least"):
        records_within(tokenizer, 100)


def test_two_questions(monkeypatch):
    problems = draw_records(2, 4)
    second = [one.value(1) for one in problems]

    def forgets(prompts, turns):
        first = [one.value() for one in problems]
        return [first, ["", second[1]]] if len(turns) == 2 else [second]

    answering(monkeypatch, "questions", forgets)
    found = two_questions(*GIVEN, "none", problems)
    assert found.first.scores.tolist() == [1, 1]
    assert found.second.scores.tolist() == [0, 1]
    assert found.second_fresh.scores.tolist() == [1, 1]
    assert all(one.asked[0] != one.asked[1] for one in problems)


def test_mathematics(monkeypatch):
    problems = [Problem("1 + 1?", "2"), Problem("a third?", r"\frac{1}{3}")]
    said = [r"It is \boxed{2}.", r"\boxed{\dfrac13}"]
    calls = answering(monkeypatch, "math_problems", lambda prompts, turns: [said])
    assert math500(*GIVEN, "none", problems).scores.tolist() == [1, 1]
    found = gsm8k(*GIVEN, "none", problems)
    assert found.scores.tolist() == [1, 0] and found.details[0] == {"said": "2"}
    tokenizer = GIVEN[2]
    assert tokenizer.decode(calls[0]["prompts"][0]).startswith("Question: 1 + 1?")
    gsm8k(None, None, Characters(begin=5, chat=True), "none", problems)
    assert tokenizer.decode(calls[2]["prompts"][0]).startswith("<user>1 + 1?")
    assert calls[2]["until"] == () != calls[0]["until"]


def test_results_are_compared_problem_by_problem(monkeypatch):
    problems = draw_records(4, 3)
    values = [one.value() for one in problems]
    answering(monkeypatch, "retrieval", lambda *_: [[*values[:3], ""]])
    full = key_value_retrieval(*GIVEN, "none", problems)
    answering(monkeypatch, "retrieval", lambda *_: [[*values[:2], "", ""]])
    found = key_value_retrieval(*GIVEN, "tova", problems)
    assert found.score == pytest.approx((0.5, 0.5 / 8**0.5))
    # one difference of -1 and the two that are added, in six
    assert found.against(full) == pytest.approx((-0.25, (2 / 6 - 1 / 36) ** 0.5 / 6**0.5))
    assert found.against(full).error < found.score.error + full.score.error
    assert full.against(full).error > 0  # four problems that agree are no certainty
    with pytest.raises(ValueError, match="must be the same problems"):
        found.against(passed_over(full))


def passed_over(found: evaluation.TaskResult) -> evaluation.TaskResult:
    """The same result of other problems."""
    changed = {**vars(found), "expected": ("other",) * 4}
    return evaluation.TaskResult(**changed)
