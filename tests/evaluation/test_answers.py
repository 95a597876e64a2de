"""Greedy answers in batches, in turns, and cut at the texts that end them."""

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.evaluation import answers as module
from diffkv_jax.evaluation.answers import answers, cut, encoded
from diffkv_jax.testing.tiny import tiny_model
from helpers_text import Characters

TOKENIZER = Characters()
MODEL = {"layers": 1, "head_dim": 32}


@pytest.fixture(scope="module")
def given():
    return *tiny_model(**MODEL), TOKENIZER


def greedy(given, prompt: str, most: int) -> str:
    model, params, tokenizer = given
    out = dkv.generate(model, params, [encoded(tokenizer, prompt)], max_new_tokens=most)
    return tokenizer.decode(out.tokens[0, : out.lengths[0]])


def test_batches_of_prompts_are_answered_one_by_one(given):
    prompts = ["to be or not", "whether it is nobler", "in the mind"]
    found = answers(*given, prompts, None, max_new_tokens=6, batch_size=2)
    assert found.turns == (tuple(greedy(given, prompt, 6) for prompt in prompts),)
    assert 0.5 < found.of_bf16


def test_a_question_that_follows_is_one_prompt_to_a_cache_that_keeps_all(given):
    document, question = "the sea is wide and the ship is small. ", "is it?"
    after = answers(*given, [document], None, turns=[[question]], max_new_tokens=6)
    together = answers(*given, [document + question], None, max_new_tokens=6)
    assert after.turns == together.turns
    other = answers(*given, [document], None, turns=[["what?"]], max_new_tokens=6)
    assert other.turns != together.turns


def test_compression_is_seen(given):
    policy = dkv.streaming_llm(0.2, window=16, flush=8)
    found = answers(*given, ["the sea " * 14], policy, turns=[["a"], ["b"]], max_new_tokens=3)
    assert [len(turn) for turn in found.turns] == [1, 1]
    plain = answers(*given, ["the sea " * 14], None, max_new_tokens=6)
    assert found.of_bf16 < plain.of_bf16


def test_answers_end_before_the_first_of_the_texts(given, monkeypatch):
    monkeypatch.setattr(module, "STRIDE", 4)
    prompts = ["to be or not", "whether it is nobler"]
    whole = [greedy(given, prompt, 12) for prompt in prompts]
    found = answers(*given, prompts, None, max_new_tokens=12, until=("nothing of it",))
    assert list(found.turns[0]) == whole  # strides of four are one answer
    end = whole[0][5:7]
    found = answers(*given, prompts, None, max_new_tokens=12, until=(end,))
    assert list(found.turns[0]) == [cut(text, (end,)) for text in whole]
    assert len(found.turns[0][0]) <= 5


def test_cut():
    assert cut("a b c", ("c", "b")) == "a " and cut("a", ("b",)) == "a" == cut("a", ())


def test_bad_input(given):
    with pytest.raises(ValueError, match="more than the model's context of 4096"):
        answers(*given, ["a" * 5000], None)
    with pytest.raises(ValueError, match="batch_size=0 must be an integer of at least 1"):
        answers(*given, ["a"], None, batch_size=0)


def test_only_what_begins_gets_the_first_token():
    tokenizer = Characters(begin=96)
    assert encoded(tokenizer, "a")[0] == 96 and encoded(tokenizer, "a", begins=False)[0] != 96
    assert encoded(tokenizer, np.array([1, 2])) == [1, 2]
