"""OpenAI's own client against a server on loopback."""

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("tokenizers")
pytest.importorskip("openai")

import openai

from diffkv_jax.server import app
from helpers_server import NAME, all_free, alone, on_loopback, tiny_engine, wait_until

TALK = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}]
TOLD = "<system>Be brief<user>Hello<assistant>"


@pytest.fixture(scope="module")
def address():
    engine = tiny_engine()
    with on_loopback(app(engine, model_name=NAME, api_key="secret")) as found:
        yield found
        wait_until(lambda: all_free(engine))


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0) as found:
        yield found


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "diffkv_jax"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_completions(client):
    found = client.completions.create(model=NAME, prompt="Hello", max_tokens=9, temperature=0)
    assert found.choices[0].text == alone("Hello", 9) and found.choices[0].finish_reason == "length"
    assert found.usage.total_tokens == 14


def test_chat(client):
    ask = client.chat.completions.create
    found = ask(model=NAME, messages=TALK, max_tokens=9, temperature=0)
    assert found.choices[0].message.content == alone(TOLD, 9)
    two = ask(model=NAME, messages=TALK, max_tokens=9, temperature=1.5, n=2, seed=3)
    again = ask(model=NAME, messages=TALK, max_tokens=9, temperature=1.5, seed=4)
    assert two.choices[1].message.content == again.choices[0].message.content
    assert two.choices[0].message.content != two.choices[1].message.content


def test_streams(client):
    whole, stop = alone(TOLD, 60), alone(TOLD, 60)[40:43]
    stream = client.chat.completions.create(
        model=NAME,
        messages=TALK,
        max_tokens=60,
        temperature=0,
        stop=stop,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage.prompt_tokens == len(TOLD)
    with client.chat.completions.stream(
        model=NAME, messages=TALK, max_tokens=30, temperature=0
    ) as events:
        (done,) = [event for event in events if event.type == "content.done"]
        assert done.content == alone(TOLD, 30)
    stream = client.completions.create(
        model=NAME, prompt="Hello", max_tokens=60, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == alone("Hello", 60)


def test_logprobs(client):
    found = client.chat.completions.create(
        model=NAME, messages=TALK, max_tokens=4, temperature=0, logprobs=True, top_logprobs=5
    )
    told = found.choices[0].logprobs.content
    assert [one.top_logprobs[0].token for one in told] == [one.token for one in told]
    assert all(len(one.top_logprobs) == 5 and one.logprob <= 0 for one in told)


def test_a_stream_that_is_closed(client):
    stream = client.completions.create(
        model=NAME, prompt="Hello", max_tokens=500, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()


def test_errors(client, address):
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model=NAME, messages=TALK, max_tokens=0)
    assert caught.value.param == "max_tokens" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        ask(model=NAME, messages=TALK, frequency_penalty=3)
    with pytest.raises(openai.NotFoundError):
        ask(model="other", messages=TALK)
    other = openai.OpenAI(base_url=f"{address}/v1", api_key="other", max_retries=0)
    with other, pytest.raises(openai.AuthenticationError):
        other.models.list()
