"""Answers of both endpoints, without a network."""

import asyncio
import json

import pytest

pytest.importorskip("starlette")
pytest.importorskip("tokenizers")

from helpers_server import END, NAME, Letters, alone, inside, tiny_engine
from helpers_text import LETTERS

GREEDY = {"model": NAME, "temperature": 0}
TALK = [{"role": "user", "content": "Hello"}]
TOLD = "<user>Hello<assistant>"


def post(served, path: str, **body):
    """The answer's JSON, or what came of each line of a stream."""

    async def run():
        async with inside(served) as client:
            return await client.post(f"/v1/{path}", json={**GREEDY, **body})

    answer = asyncio.run(run())
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()
    assert answer.headers["content-type"].startswith("text/event-stream")
    *lines, end = answer.text.split("\n\n")
    assert end == "" and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion(served):
    found = post(served, "completions", prompt="Hello", max_tokens=12)
    assert found["object"] == "text_completion" and found["model"] == NAME
    choice = {"index": 0, "text": alone("Hello", 12), "logprobs": None, "finish_reason": "length"}
    assert found["choices"] == [choice]
    usage = {"prompt_tokens": 5, "completion_tokens": 12, "total_tokens": 17}
    assert found["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}


def test_sixteen_tokens_are_the_default_of_a_completion(served):
    assert post(served, "completions", prompt="Hi")["usage"]["completion_tokens"] == 16


def test_every_form_of_a_prompt(served):
    ids = Letters()("Hello").input_ids
    more = Letters()("Bye").input_ids
    for prompt in ("Hello", ["Hello"], ids, [ids]):
        (choice,) = post(served, "completions", prompt=prompt, max_tokens=6)["choices"]
        assert choice["text"] == alone("Hello", 6), prompt
    for prompt in (["Hello", "Bye"], [ids, more]):
        found = post(served, "completions", prompt=prompt, max_tokens=6)
        texts = [choice["text"] for choice in found["choices"]]
        assert texts == [alone("Hello", 6), alone("Bye", 6)]
        assert found["usage"]["prompt_tokens"] == 8 and found["usage"]["completion_tokens"] == 12


def test_a_chat(served):
    found = post(served, "chat/completions", messages=TALK, max_completion_tokens=7, max_tokens=2)
    assert found["object"] == "chat.completion"
    message = {"role": "assistant", "content": alone(TOLD, 7), "refusal": None}
    end = {"logprobs": None, "finish_reason": "length"}
    assert found["choices"] == [{"index": 0, "message": message, **end}]
    assert found["usage"]["prompt_tokens"] == len(TOLD)


def test_a_chat_ends_where_the_room_does(served, engine):
    found = post(served, "chat/completions", messages=TALK)
    assert found["usage"]["total_tokens"] == engine.max_len + 1
    assert found["choices"][0]["finish_reason"] == "length"


def test_parts_of_a_message_are_joined(served):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    talk = [{"role": "user", "content": parts}]
    found = post(served, "chat/completions", messages=talk, max_tokens=7)
    assert found["choices"][0]["message"]["content"] == alone(TOLD, 7)


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_of_a_completion(served, include_usage):
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    found = post(served, "completions", prompt="Hello", max_tokens=40, stream=True, **options)
    assert len({chunk["id"] for chunk in found}) == 1
    assert {chunk["object"] for chunk in found} == {"text_completion"}
    if include_usage:
        last = found.pop()
        assert last["choices"] == [] and last["usage"]["total_tokens"] == 45
        assert all(chunk["usage"] is None for chunk in found)
    assert all("usage" not in chunk for chunk in found) or include_usage
    choices = [chunk["choices"][0] for chunk in found]
    assert len(choices) > 1, "all at once"
    assert "".join(choice["text"] for choice in choices) == alone("Hello", 40)
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]


def test_a_stream_of_a_chat_with_choices(served):
    found = post(served, "chat/completions", messages=TALK, max_tokens=20, stream=True, n=2)
    for index in (0, 1):
        mine = [c for chunk in found for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert mine[-1]["delta"] == {} and mine[-1]["finish_reason"] == "length"
        assert "".join(c["delta"].get("content", "") for c in mine) == alone(TOLD, 20)


def test_seeds_of_choices_follow_each_other(served):
    def texts(**body):
        body = {"prompt": "Hi", "max_tokens": 20, "temperature": 1.5, **body}
        return [c["text"] for c in post(served, "completions", **body)["choices"]]

    three = texts(seed=5, n=3)
    assert len(set(three)) == 3
    assert three == [*texts(seed=5), *texts(seed=6), *texts(seed=7)]
    assert texts(n=2)[0] != texts(n=2)[0]  # without one they differ
    assert texts(seed=5, top_k=1) == [alone("Hi", 20)]
    assert texts(seed=5, top_k=-1, min_p=0, top_p=1) == three[:1]
    assert texts(seed=5, top_p=1e-6) == texts(seed=5, min_p=1.0) == [alone("Hi", 20)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_and_is_not_shown(served, stream):
    whole = alone("Hello", 40)
    stop = whole[20:23]
    body = {"prompt": "Hello", "max_tokens": 40, "stop": ["\0", stop], "stream": stream}
    found = post(served, "completions", **body)
    parts = [c for chunk in (found if stream else [found]) for c in chunk["choices"]]
    assert "".join(c["text"] for c in parts) == whole[: whole.index(stop)]
    assert parts[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(served, stream):
    body = {"prompt": "Hello", "max_tokens": 10, "logprobs": 3, "stream": stream}
    found = post(served, "completions", **body)
    told = [c["logprobs"] for chunk in (found if stream else [found]) for c in chunk["choices"]]
    tokens = [token for one in told for token in one["tokens"]]
    text = alone("Hello", 10)
    assert "".join(tokens).replace(END, "") == text and END in tokens
    logprobs = [x for one in told for x in one["token_logprobs"]]
    top = [x for one in told for x in one["top_logprobs"]]
    offsets = [x for one in told for x in one["text_offset"]]
    assert all(text[at] == token for at, token in zip(offsets, tokens, strict=True) if token != END)
    for token, logprob, likeliest in zip(tokens, logprobs, top, strict=True):
        assert len(likeliest) == 3 and max(likeliest.values()) == likeliest[token] == logprob <= 0


def test_logprobs_of_a_chat(served, engine):
    body = {"messages": TALK, "max_tokens": 5, "logprobs": True}
    found = post(served, "chat/completions", **body, top_logprobs=2)
    (choice,) = found["choices"]
    told = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in told) == choice["message"]["content"]
    for one in told:
        assert one["bytes"] == list(one["token"].encode()) and len(one["top_logprobs"]) == 2
        assert one["top_logprobs"][0] == {k: one[k] for k in ("token", "logprob", "bytes")}
    without = post(served, "chat/completions", **body)["choices"][0]["logprobs"]["content"]
    assert [one["logprob"] for one in without] == [one["logprob"] for one in told]
    assert all(one["top_logprobs"] == [] for one in without)


def test_penalties_and_biases_are_those_of_the_engine(served):
    engine, e = tiny_engine(), LETTERS.index("e")
    api = {
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.3,
        "logit_bias": {str(e): 3.5},
    }
    own = {"frequency": 0.5, "presence": -0.5, "repetition": 1.3, "bias": {e: 3.5}}
    texts = []
    for (name, value), (field, same) in zip(api.items(), own.items(), strict=True):
        body = {"prompt": "Hello", "max_tokens": 60, name: value}
        texts.append(post(served, "completions", **body)["choices"][0]["text"])
        request = engine.submit("Hello", max_new_tokens=60, penalties={field: same})
        assert [*engine.run()] and texts[-1] == request.text
    assert len({*texts, alone("Hello", 60)}) == 5


def test_what_asks_for_nothing_is_taken(served):
    nothing = {"user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}
    body = {"prompt": "Hello", "max_tokens": 6, "echo": False, "best_of": 1, "suffix": None}
    found = post(served, "completions", **body, **nothing, stop=[], seed=None, n=None)
    assert found["choices"][0]["text"] == alone("Hello", 6)


def test_the_letters_are_those_of_the_model():
    assert Letters().backend_tokenizer.get_vocab_size() == len(LETTERS) + 1 == 97
