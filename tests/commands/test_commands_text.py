"""`diffkv generate` and `diffkv chat` on a tiny model."""

import json

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.commands import chat as chat_command
from diffkv_jax.commands.answer import answered
from diffkv_jax.evaluation.policies import policy_of
from diffkv_jax.serving import Engine
from helpers_tokenizer import loaded_once

POLICY = "diffkv(1, 0, window=16, flush=8, transform=Exact())"
CAT = "the cat sat on the mat, where is the cat"


def ids_of(model: str, text: str) -> list[int]:
    tokenizer = loaded_once(model, "auto").tokenizer
    assert tokenizer is not None
    return tokenizer(text).input_ids


def alone(model: str, text: str, count: int) -> list[int]:
    """What `generate` writes after a text."""
    loaded = loaded_once(model, "auto")
    ids = ids_of(model, text)
    out = dkv.generate(
        loaded.model, loaded.params, [ids], policy=policy_of(POLICY), max_new_tokens=count
    )
    return out.tokens[0, : out.lengths[0]].tolist()


def test_text_on_stdout_and_one_line_of_figures_on_stderr(diffkv, model):
    said = diffkv("generate", CAT, "--no-chat", "--max-new-tokens", 24)
    assert said.exit_code == 0, said.output
    expected = loaded_once(model, "auto").tokenizer.decode(
        alone(model, CAT, 24), skip_special_tokens=True
    )
    assert said.stdout == expected + "\n"
    assert said.stderr.count("\n") == 1
    assert "24 tokens (length)" in said.stderr and "prompt tokens; cache " in said.stderr


def test_json_is_all_of_stdout_and_holds_the_tokens(diffkv, model):
    said = diffkv("generate", CAT, "--no-chat", "--max-new-tokens", 24, "--json")
    found = json.loads(said.stdout)
    assert said.exit_code == 0 and said.stderr == ""
    assert found["tokens"] == alone(model, CAT, 24)
    ids = ids_of(model, CAT)
    assert (found["prompt_tokens"], found["new_tokens"]) == (len(ids), 24)
    assert found["finish_reason"] == "length" and 0 < found["seconds_to_first_token"]
    assert found["seconds_to_first_token"] < found["seconds"]
    assert found["cache_bytes"] > 0 and found["bf16_bytes"] > 0


def test_the_prompt_from_stdin_and_by_the_chat_template(diffkv, model):
    written = diffkv("generate", "-", "--json", "--max-new-tokens", 4, input=CAT)
    template = loaded_once(model, "auto").tokenizer.apply_chat_template(
        [{"role": "user", "content": CAT}], tokenize=False, add_generation_prompt=True
    )
    found = json.loads(written.stdout)
    assert found["tokens"] == alone(model, template, 4) != alone(model, CAT, 4)


def test_draws_depend_on_the_seed_alone(diffkv):
    def draw(*options):
        asked = ("--no-chat", "--json", "--max-new-tokens", 12, *options)
        return json.loads(diffkv("generate", CAT, *asked).stdout)["tokens"]

    one = draw("--temperature", 3, "--seed", 1)
    assert draw("--temperature", 3, "--seed", 1) == one != draw("--temperature", 3, "--seed", 2)
    likeliest = draw("--temperature", 0)
    assert draw("--temperature", 3, "--top-k", 1, "--seed", 1) == likeliest == draw()


def test_a_stop_text_ends_it(diffkv):
    asked = ("--no-chat", "--json", "--max-new-tokens", 24)
    text = json.loads(diffkv("generate", CAT, *asked).stdout)["text"]
    stop = next(c for c in text[3:] if c.isascii() and text.index(c) > 1)
    found = json.loads(diffkv("generate", CAT, *asked, "--stop", stop).stdout)
    assert found["finish_reason"] == "stop" and found["text"] == text[: text.index(stop)]


WRONG = {
    "a policy that is none": (["--policy", "diffv(1, 0)"], "did you mean 'diffkv'?"),
    "a budget too small": (["--memory-budget", "1KiB"], "memory_budget='1KiB' cannot hold"),
    "a temperature below zero": (["--temperature", "-1"], "temperature=-1.0 must be positive"),
    "more than the context": (["--max-new-tokens", "4000"], "2048"),
    "no such dtype": (["--dtype", "int8"], "dtype must be one of"),
}


@pytest.mark.parametrize("options, message", WRONG.values(), ids=WRONG)
def test_what_is_refused_is_one_line_and_code_2(diffkv, options, message):
    policy = None if "--policy" in options else POLICY
    said = diffkv("generate", CAT, *options, policy=policy)
    assert said.exit_code == 2 and said.stdout == ""
    assert said.stderr.startswith("diffkv: ") and said.stderr.count("\n") == 1
    assert message in said.stderr


def engine_of(model: str) -> Engine:
    loaded = loaded_once(model, "auto")
    return Engine(
        loaded.model,
        loaded.params,
        tokenizer=loaded.tokenizer,
        max_requests=1,
        max_len=256,
        policy=policy_of(POLICY),
    )


def test_ctrl_c_cancels_the_request_and_leaves_the_engine_usable(model):
    engine, shown = engine_of(model), []

    def show(text):
        shown.append(text)
        if len(shown) == 1:
            raise KeyboardInterrupt

    cancelled = answered(engine, CAT, show, max_new_tokens=128)
    assert cancelled.request.finish_reason == "cancelled" and not engine.busy
    assert 0 < len(cancelled.request.tokens) < 128
    after = answered(engine, CAT, shown.append, max_new_tokens=8)
    assert after.request.tokens == alone(model, CAT, 8)


def test_ctrl_c_in_generate_is_130(diffkv, monkeypatch):
    def pressed(engine, prompt, show, **asked):
        request = engine.submit(prompt, max_new_tokens=4)
        request.cancel()
        return answered(_Submitted(engine, request), prompt, show)

    monkeypatch.setattr("diffkv_jax.commands.answer.answered", pressed)
    assert diffkv("generate", CAT).exit_code == 130


class _Submitted:
    """An engine that has the request already."""

    def __init__(self, engine, request):
        self.submit, self.step = lambda *_, **__: request, engine.step
        self.memory_report = engine.memory_report


def test_a_conversation_from_stdin_is_submitted_whole_each_turn(diffkv, monkeypatch):
    given = []
    submit = Engine.submit

    def submitted(self, prompt, **asked):
        given.append([dict(message) for message in prompt])
        return submit(self, prompt, **asked)

    monkeypatch.setattr(Engine, "submit", submitted)
    lines = "the cat\n\nwhere is the mat\n/reset\nthe mat\n/exit\nnever\n"
    asked = ("--system", "sat", "--max-new-tokens", 6)
    said = diffkv("chat", *asked, input=lines)
    assert said.exit_code == 0, said.output
    first, second, third = given
    system = {"role": "system", "content": "sat"}
    assert first == [system, {"role": "user", "content": "the cat"}]
    answer = second[2]["content"]
    assert second == [
        *first,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "where is the mat"},
    ]
    assert third == [system, {"role": "user", "content": "the mat"}]
    assert said.stdout.startswith(answer + "\n") and answer
    assert said.stderr == "a new conversation\n"


def test_a_conversation_that_is_too_long_is_told_and_goes_on(diffkv):
    lines = "the cat " * 100 + "\nthe cat\n"
    said = diffkv("chat", "--max-len", 64, "--max-new-tokens", 4, input=lines)
    assert said.exit_code == 0
    assert said.stderr.count("\n") == 1 and "/reset begins a new conversation" in said.stderr
    assert len(said.stdout) > 1  # of the second


def test_a_model_without_a_template_cannot_chat(diffkv, monkeypatch):
    monkeypatch.setattr("diffkv_jax.commands.loading.has_template", lambda tokenizer: False)
    said = diffkv("chat", input="the cat\n")
    assert said.exit_code == 2 and "has no chat template" in said.stderr
    assert diffkv("generate", CAT, "--chat").exit_code == 2


def test_lines_are_read_until_the_end_of_the_terminal(monkeypatch, capsys):
    typed = iter(["  the cat ", EOFError])

    def read(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", read)
    assert list(chat_command._lines()) == ["the cat"]
    assert "/reset" in capsys.readouterr().err


def test_the_report_of_an_engine_is_of_what_its_requests_hold(model):
    engine, reports = engine_of(model), []
    tokens = np.arange(5, 105)
    answer = answered(engine, tokens, reports.append, max_new_tokens=40)
    loaded = loaded_once(model, "auto")
    options = {"policy": policy_of(POLICY), "max_len": 256}
    seen = answer.memory.bf16 // (2 * 2 * 2 * 16 * 2)  # layers, KV heads, K and V, channels, bytes
    assert 100 < seen <= 139
    out = dkv.generate(
        loaded.model,
        loaded.params,
        [tokens],
        max_new_tokens=int(seen) - 99,
        prefill_chunk=256,
        **options,
    )
    assert dkv.memory_report(out.cache).logical == answer.memory.logical
