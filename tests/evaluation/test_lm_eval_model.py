"""The interface of lm-eval on a tiny model; a stand-in of its base class where it is absent."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.testing.tiny import tiny_model
from helpers_text import Characters

NAME = "diffkv_jax.evaluation.lm_eval_model"


def stand_in() -> dict[str, ModuleType]:
    class LM:
        def __init__(self):
            self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    found = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
    vars(found["lm_eval.api.model"])["LM"] = LM
    return found


@pytest.fixture(scope="module")
def lm():
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_in().items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, NAME, raising=False)
        module = importlib.import_module(NAME)
        yield module.CompressedLM(*tiny_model(layers=1, head_dim=32), Characters(begin=96))
    sys.modules.pop(NAME, None)


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


def test_loglikelihood_is_what_the_model_gives(lm):
    (found,) = lm.loglikelihood(requests(("to be or ", "not to be")))
    ids = lm.tokenizer("to be or not to be").input_ids
    context = len("to be or") + 1  # the first token; the space goes with the continuation
    rows, _ = teacher_forced(lm.model, lm.params, [ids], context - 1, None)
    said = rows[0, np.arange(len(ids) - context), ids[context:]].sum()
    assert found == (pytest.approx(float(said), abs=1e-3), False)


def test_no_token_of_a_continuation_is_lost(lm):
    lm.tokenizer, kept = Characters(), lm.tokenizer  # puts nothing before a text
    try:
        before, after = lm._pair("  ", "word")
        assert lm.tokenizer.decode(after) == "  word" and before == [lm._prefix()]
        assert lm._pair("a ", "word") == (lm.tokenizer("a").input_ids, after[1:])
    finally:
        lm.tokenizer = kept


def test_greedy_continuations_are_called_so(lm):
    out = dkv.generate(lm.model, lm.params, [lm.tokenizer("to be").input_ids], max_new_tokens=3)
    text = lm.tokenizer.decode(out.tokens[0])
    lm.tokenizer, kept = Characters(begin=96), lm.tokenizer
    scored = lm._scored(lm.tokenizer("to be").input_ids, out.tokens[0].tolist())
    assert scored[1] and scored[0] < 0
    other = [*out.tokens[0, :2].tolist(), int(out.tokens[0, 2] + 1) % 96]
    assert not lm._scored(lm.tokenizer("to be").input_ids, other)[1]
    lm.tokenizer = kept
    given = ("to be", {"until": [], "max_gen_toks": 3})
    assert lm.generate_until(requests(given)) == [text]


def test_rolling_texts_begin_with_the_prefix(lm):
    ids = [lm._prefix(), *lm.tokenizer("whether", add_special_tokens=False).input_ids]
    (found,) = lm.loglikelihood_rolling(requests(("whether",)))
    rows, _ = teacher_forced(lm.model, lm.params, [ids], 1, None, first=True)
    said = rows[0, np.arange(7), ids[1:]].sum()
    assert found == pytest.approx(float(said), abs=1e-3)
    lm.limit, kept = 4, lm.limit  # windows of three tokens behind one
    (parts,) = lm.loglikelihood_rolling(requests(("whether",)))
    lm.limit = kept
    whole = sum(lm._scored(ids[i : i + 1], ids[i + 1 : i + 4])[0] for i in (0, 3, 6))
    assert parts == pytest.approx(whole, abs=1e-3) and parts != pytest.approx(found, abs=1e-3)


def test_what_it_does_not_do_is_refused(lm):
    for given, rule in (
        ({"do_sample": True, "temperature": 0.7}, "CompressedLM is greedy"),
        ({"max_gen_toks": 5000}, "below the model's context of 4096"),
    ):
        with pytest.raises(ValueError, match=rule):
            lm.generate_until(requests(("a", given)))
    assert lm._how({"until": "\n", "do_sample": False}) == (("\n",), 256)


def test_without_lm_eval_the_import_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'diffkv-jax\[eval\]'"):
        importlib.import_module(NAME)
