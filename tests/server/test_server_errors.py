"""What is refused, and how: errors in OpenAI's form."""

import asyncio
import json

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("tokenizers")

from starlette.applications import Starlette
from starlette.routing import Mount

from diffkv_jax.server import app
from helpers_server import NAME, alone, inside, tiny_engine, wait_until

COMMON = {"model": NAME, "max_tokens": 4, "temperature": 0}
COMPLETION = {**COMMON, "prompt": "Hello"}
CHAT = {**COMMON, "messages": [{"role": "user", "content": "Hello"}]}
NO_VALUE = object()


def ask(served, method: str, path: str, **options):
    async def run():
        async with inside(served) as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def error_of(answer, status: int) -> dict:
    assert answer.status_code == status, answer.text
    (name,) = answer.json()
    error = answer.json()["error"]
    assert name == "error" and set(error) == {"message", "type", "param", "code"}
    return error


def refused(served, base: dict, status: int = 400, **changes) -> dict:
    path = "/v1/completions" if "prompt" in base else "/v1/chat/completions"
    body = {**base, **changes}
    body = {name: value for name, value in body.items() if value is not NO_VALUE}
    return error_of(ask(served, "POST", path, json=body), status)


BOTH = {
    "n": (0, 129, 1.5, "2", True),
    "max_tokens": (0, -1, "4", 2.5, 2**40),
    "temperature": (-1, 2.1, "hot", 1e-42),
    "top_p": (0, 1.1),
    "top_k": (-2, 1.5),
    "min_p": (-0.1, 1.5),
    "stop": (["a"] * 5, [""], 3, [3]),
    "seed": ("x", 1.5, 2**63, -(2**63) - 1),
    "stream": ("yes", 1),
    "stream_options": ({"include_usage": 3}, {"other": 1}),
    "presence_penalty": (2.5, "x"),
    "frequency_penalty": (-2.1,),
    "repetition_penalty": (0, -1),
    "logit_bias": ({"a": 1}, {"97": 1}, {"-1": 1}, {"5": 101}, {"5": "x"}, [5]),
    "user": (3,),
    "model": (3, None, NO_VALUE),
    "surprise": (1, None),
    "tools": ([{"type": "function"}],),
    "response_format": ({"type": "json_object"},),
}
ONLY = {
    "prompt": (NO_VALUE, None, [], "", ["a", 1], [[]], [1.5], [True], 3, {}, ["a", [1]]),
    "logprobs": (6, -1, True),
    "echo": (True, 1),
    "suffix": ("x",),
    "best_of": (2, True),
    "max_completion_tokens": (3,),
}
ONLY_CHAT = {
    "messages": (NO_VALUE, None, [], "Hello", ["Hello"], [{"role": "user", "content": 3}]),
    "logprobs": (3,),
    "top_logprobs": (21, 2),
    "max_completion_tokens": (0,),
    "echo": (True,),
}


@pytest.mark.parametrize(
    ("base", "table"), [(COMPLETION, {**BOTH, **ONLY}), (CHAT, {**BOTH, **ONLY_CHAT})]
)
def test_wrong_values_name_their_parameter(served, base, table):
    for name, values in table.items():
        for value in values:
            error = refused(served, base, **{name: value})
            assert error["type"] == "invalid_request_error" and error["message"], error
            assert error["param"] == name, (name, value, error)


@pytest.mark.parametrize("ids", [[97], [-1], [2**31], [2**70], [0, 2**63]])
def test_token_ids_out_of_range(served, ids):
    assert refused(served, COMPLETION, prompt=ids)["param"] == "prompt"


@pytest.mark.parametrize("role", ["robot", 3, None])
def test_wrong_roles_and_fields_of_messages(served, role):
    message = {"role": role, "content": "x"}
    assert "messages.0.role" in refused(served, CHAT, messages=[message])["message"]
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    assert refused(served, CHAT, messages=[image])["param"] == "messages"


def test_messages_that_the_template_refuses(served):
    error = refused(served, CHAT, messages=[{"role": "tool", "content": "x"}])
    assert error["param"] == "messages" and "cannot begin with a tool" in error["message"]


def test_more_tokens_than_there_is_room_for(served, engine):
    error = refused(served, COMPLETION, max_tokens=engine.max_len)
    assert error["code"] == "context_length_exceeded" and str(engine.max_len) in error["message"]
    error = refused(served, CHAT, messages=[{"role": "user", "content": "x" * 600}])
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"


def test_another_model(served):
    for base in (COMPLETION, CHAT):
        assert refused(served, base, 404, model="other")["code"] == "model_not_found"
    assert error_of(ask(served, "GET", "/v1/models/other"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b'{"model": NaN}', b"\xff", b"[" * 50_000, b'{"a":"\\ud800"}']
)
def test_bodies_that_are_no_json_objects(served, raw):
    for path in ("completions", "chat/completions"):
        error = error_of(ask(served, "POST", f"/v1/{path}", content=raw), 400)
        assert error["param"] is None


def test_routes_and_methods_that_are_not_there(served):
    for path in ("/v1/embeddings", "/v1/models/", "/other"):
        error_of(ask(served, "GET", path), 404)
    wrong = [("GET", "/v1/completions"), ("PUT", "/v1/chat/completions"), ("POST", "/v1/models")]
    for method, path in wrong:
        answer = ask(served, method, path)
        error_of(answer, 405)
        assert answer.headers["allow"]


def test_bodies_that_are_too_large(engine):
    served = app(engine, model_name=NAME, max_body_bytes=100)
    read = []

    async def parts():
        for _ in range(50):
            read.append(1)
            yield b" " * 60

    told = ask(served, "POST", "/v1/completions", content=b" " * 101)
    assert error_of(told, 413)["type"] == "invalid_request_error"
    # without a Content-Length it is read, but not to its end
    error_of(ask(served, "POST", "/v1/completions", content=parts()), 413)
    assert len(read) < 5
    exact = json.dumps({"model": NAME, "prompt": "Hello"}).encode().ljust(100)
    assert ask(served, "POST", "/v1/completions", content=exact).status_code == 200
    served.state.driver.close(5)


def test_keys(engine):
    served = app(engine, model_name=NAME, api_key="secret")
    for key in (None, "Bearer other", "Bearer", "secret", "Bearer secret1", "Basic secret"):
        headers = {} if key is None else {"Authorization": key}
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/v1/x")):
            answer = ask(served, method, path, headers=headers)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
    headers = {"Authorization": "Bearer secret"}
    assert ask(served, "GET", "/v1/models", headers=headers).status_code == 200
    assert ask(served, "POST", "/v1/completions", json=COMPLETION).status_code == 401
    right = ask(served, "POST", "/v1/completions", json=COMPLETION, headers=headers)
    assert right.json()["choices"][0]["text"] == alone("Hello", 4)
    for path in ("/health", "/", "/metrics", "/stats.json"):
        assert ask(served, "GET", path).status_code == 200
    below = Starlette(routes=[Mount("/llm", served)])  # behind a prefix too
    error_of(ask(below, "GET", "/llm/v1/models"), 401)
    assert ask(below, "GET", "/llm/v1/models", headers=headers).status_code == 200
    served.state.driver.close(5)


def test_too_many(engine):
    served = app(engine, model_name=NAME, max_queue=1)
    long = {**COMPLETION, "max_tokens": 400}

    async def run():
        async with inside(served) as client:
            asked = [client.post("/v1/completions", json=long) for _ in range(6)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(run())
    assert sorted(x.status_code for x in answers) == [200] * 3 + [429] * 3
    for answer in answers:
        if answer.status_code == 429:
            assert error_of(answer, 429)["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1
        else:
            assert answer.json()["choices"][0]["text"] == alone("Hello", 400)
    assert refused(served, COMPLETION, n=4)["param"] == "n"  # never possible
    served.state.driver.close(5)


def test_too_slow(engine):
    served = app(engine, model_name=NAME, timeout_seconds=0.02)
    long = {**COMPLETION, "max_tokens": 450}
    answer = ask(served, "POST", "/v1/completions", json=long)
    assert error_of(answer, 504)["type"] == "timeout_error"
    streamed = ask(served, "POST", "/v1/completions", json={**long, "stream": True})
    assert streamed.status_code == 200
    last = streamed.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    wait_until(lambda: not engine.busy)
    served.state.driver.close(5)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails(stream):
    engine = tiny_engine()
    served = app(engine, model_name=NAME)
    assert ask(served, "GET", "/health").json() == {"status": "ok"}

    def broken():
        raise RuntimeError("device lost")

    engine.step = broken
    answer = ask(served, "POST", "/v1/completions", json={**COMPLETION, "stream": stream})
    if stream:
        assert json.loads(answer.text.removeprefix("data: "))["error"]["type"] == "server_error"
    else:
        assert error_of(answer, 500)["type"] == "server_error"
    assert refused(served, CHAT, 500)["code"] == "engine"
    health = ask(served, "GET", "/health")
    assert health.status_code == 500 and "device lost" in health.json()["error"]
    assert ask(served, "GET", "/stats.json").json()["failed"] is True
    served.state.driver.close(5)


@pytest.mark.parametrize("stream", [False, True])
def test_numbers_that_are_not_finite(stream):
    engine = tiny_engine()
    params = engine._scheduler.slots.params
    head = np.full_like(params["lm_head"]["kernel"], np.nan)
    engine._scheduler.slots.params = {**params, "lm_head": {"kernel": head}}
    served = app(engine, model_name=NAME)
    answer = ask(served, "POST", "/v1/completions", json={**COMPLETION, "stream": stream})
    if stream:
        assert json.loads(answer.text.removeprefix("data: "))["error"]["code"] == "not_finite"
    else:
        assert error_of(answer, 500)["code"] == "not_finite"
    assert ask(served, "GET", "/health").status_code == 200
    served.state.driver.close(5)


def test_bad_options(engine):
    wrong = [
        {"model_name": 3},
        {"api_key": 3},
        {"api_key": ""},
        {"api_key": "secret\n"},
        {"max_queue": -1},
        {"max_body_bytes": 0},
        {"timeout_seconds": 0},
        {"drain_seconds": -1},
    ]
    for options in wrong:
        with pytest.raises(ValueError, match=next(iter(options))):
            app(engine, **{"model_name": NAME, **options})
    with pytest.raises(TypeError, match="engine"):
        app(3, model_name=NAME)
    engine.tokenizer, kept = None, engine.tokenizer
    with pytest.raises(ValueError, match="tokenizer="):
        app(engine, model_name=NAME)
    engine.tokenizer = kept
