"""The serving benchmark: what it makes of times, and the rates on paper, by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.serving.measured import Run, Served
from benchmarks.serving.on_paper import GIB, Card, Model, rate
from benchmarks.serving.ours import serve
from benchmarks.serving.workload import arrivals
from diffkv_jax import diffkv
from diffkv_jax.testing.tiny import tiny_model
from helpers_text import Characters


def test_a_row_worked_by_hand():
    first = Served(0.0, [1.0, 1.0, 1.5, 2.0])  # two tokens of one call
    second = Served(1.0, [1.5, 2.0])
    row = Run([first, second], 2.0, [1, 2, 2], 0.01, 3).row()
    assert row["tokens/s"] == 3.0 and row["at once"] == pytest.approx(5 / 3)
    assert (row["first p50"], row["gap p50"], row["scheduler"]) == (750.0, 500.0, 1.0)
    assert row["a token p50"] == pytest.approx(1e3 * (1 / 3 + 0.5) / 2) and row["parks"] == 3


def test_rates_worked_by_hand():
    model, card = Model("m", 1e9, 2 * GIB, 1024), Card("c", 10 * GIB, GIB, 1e15)
    # 7 GiB for caches of (0 + 2 GiB / 2) each: 7; a step reads 2 + 7 GiB
    at_once, found = rate(model, card, 1.0, 0, 2 * GIB // 1024)
    assert (at_once, found) == (7, pytest.approx(7 / 9, rel=1e-3))
    assert rate(model, card, 0.5, 0, 2 * GIB // 1024)[0] == 14
    assert rate(model, Card("small", GIB, GIB, 1e15), 1.0, 0, 1024) == (0, 0.0)


def test_problems_and_documents_arrive(tmp_path):
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(json.dumps({"question": f"{i} and {i}?"}) for i in range(3)))
    tokenizer, how = Characters(chat=True), {"prompt_tokens": 40, "new_tokens": 90}
    asked = arrivals(tokenizer, 50, **how, problems=problems, rate=2.0)
    gaps = np.diff([0, *(one.seconds for one in asked)])
    assert gaps.min() > 0 and gaps.mean() == pytest.approx(0.5, rel=0.4)
    assert asked[0].prompt == asked[3].prompt != asked[1].prompt
    assert 60 <= min(one.new_tokens for one in asked) < max(one.new_tokens for one in asked) <= 120


@pytest.mark.slow
def test_all_are_served(monkeypatch):
    from benchmarks.serving import workload

    monkeypatch.setattr(workload, "load_text", lambda _: "to be or not to be " * 100)
    model, params = tiny_model()
    made = arrivals(Ids(), 5, prompt_tokens=40, new_tokens=9, problems=None, rate=None)
    options = {"max_requests": 2, "max_len": 128, "prefill_chunk": 32, "memory_budget": "2MiB"}
    run = serve((model, params, None), diffkv(queries=16, window=16, flush=8), made, **options)
    assert [len(one.tokens) for one in run.served] == [9] * 5 and max(run.at_once) == 2
    assert run.scheduling is not None and 0 < run.scheduling < 1


class Ids:
    """A tokenizer whose ids are those of the tiny model."""

    def __call__(self, text: str, **_) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(letter) % 97 for letter in text])
