"""The demo writes with any model that has a tokenizer, with or without a chat template."""

import numpy as np
import pytest
import typer

import demo
from diffkv_jax.models.load import Pretrained
from diffkv_jax.testing.tiny import tiny_model
from helpers_text import Characters

PLAY = "To be, or not to be, that is the question. " * 400


@pytest.fixture
def any_text(monkeypatch):
    monkeypatch.setattr(demo, "load_text", lambda name: PLAY)


def test_prompts_of_both_kinds_of_models(any_text):
    asked = f"Read this:\n\n{PLAY[:500]}\n\n{demo.QUESTION}"
    long, short = demo.prompts(Characters(begin=3, chat=True), 500)
    assert Characters().decode(long) == f"<user>{asked}<assistant>"  # a template begins by itself
    assert Characters().decode(short) == f"<user>{demo.CHAT}<assistant>"
    (first, *rest), _ = demo.prompts(Characters(begin=3), 500)
    assert first == 3 and Characters().decode(rest) == asked


def test_what_it_cannot_write_with_is_refused(monkeypatch):
    model, params = tiny_model(max_len=512)
    for given, said in (((model, Characters()), "512 tokens"), ((model, None), "tokenizer None")):
        loaded = Pretrained(given[0], params, given[1])
        monkeypatch.setattr(demo, "load_pretrained", lambda path, loaded=loaded: loaded)
        with pytest.raises(typer.BadParameter, match=said):
            demo.main(model="some.gguf")
    with pytest.raises(typer.BadParameter, match="no-such-model.gguf"):
        monkeypatch.undo()
        demo.main(model="no-such-model.gguf")
    with pytest.raises(typer.BadParameter, match="did you mean 'diffkv'"):
        demo.main(policy="difkv(1, 0)")


@pytest.mark.slow
def test_writes_with_a_given_model(any_text, monkeypatch, capsys):
    model, params = tiny_model(max_len=1024)
    seen = []

    def load(path):
        seen.append(path)
        return Pretrained(model, params, Characters(chat=True))

    def texts(tokenizer, names, count):
        return np.array([tokenizer(PLAY[:count]).input_ids] * len(names))

    monkeypatch.setattr(demo, "load_pretrained", load)
    monkeypatch.setattr(demo, "text_tokens", texts)
    demo.main(model="some.gguf", policy="quantized('K8V4')", tokens=3, steps=3)
    printed = capsys.readouterr().out
    assert seen == ["some.gguf"]
    assert "K8V4" in printed and "3 tokens after 696" in printed
    assert "12 requests in" in printed
