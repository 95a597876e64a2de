"""Clients that come and go: pages of those that leave are free, nobody else notices."""

import asyncio
import json
import random
import re
import threading

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("tokenizers")
pytest.importorskip("httpx")

import httpx

from diffkv_jax.server import app, watch
from helpers_server import NAME, all_free, alone, inside, on_loopback, tiny_engine, wait_until

LONG = {"model": NAME, "prompt": "Hello", "max_tokens": 500, "temperature": 0}


@pytest.fixture(scope="module")
def address(served):
    with on_loopback(served) as found:
        yield found


async def texts(client, **body) -> list[str]:
    """Text of each line of a stream."""
    found = []
    async with client.stream("POST", "/v1/completions", json={**LONG, **body}) as answer:
        async for line in answer.aiter_lines():
            if line and line != "data: [DONE]":
                found.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
    return found


def test_who_leaves_a_stream_frees_the_pages(address, engine):
    done = []

    def keep(request):
        done.append(request)
        return request

    submit, engine.submit = engine.submit, lambda **options: keep(submit(**options))

    async def run():
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            async with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as x:
                async for line in x.aiter_lines():
                    assert line.startswith("data: {")
                    assert not all_free(engine)
                    break

    try:
        asyncio.run(run())
    finally:
        del engine.submit
    wait_until(lambda: all_free(engine))
    assert [request.finish_reason for request in done] == ["cancelled"]


def test_who_leaves_before_an_answer_frees_the_pages(address, engine, served):
    driver = served.state.driver

    async def run():
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            task = asyncio.create_task(client.post("/v1/completions", json={**LONG, "n": 8}))
            while driver.num_open < 8:
                await asyncio.sleep(0.002)
            requests = list(driver._open)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return requests

    requests = asyncio.run(run())
    assert len(requests) == 8
    wait_until(lambda: all_free(engine) and not driver._mail)
    assert all(request.finish_reason == "cancelled" for request in requests)


def test_sixteen_clients_of_whom_some_leave(address, engine):
    draw = random.Random(0)

    async def one(client, i: int) -> str | None:
        prompt, count = f"client {i}", draw.randrange(40, 160)
        leaves, stream = i % 3 == 0, i % 2 == 0
        body = {**LONG, "prompt": prompt, "max_tokens": count}
        await asyncio.sleep(draw.random() / 4)
        if leaves:
            work = (
                texts(client, **body, stream=True)
                if stream
                else client.post("/v1/completions", json=body)
            )
            try:
                await asyncio.wait_for(work, draw.random() / 10)
            except TimeoutError:
                return None
            return None
        if stream:
            found = "".join(await texts(client, **body, stream=True))
        else:
            answer = await client.post("/v1/completions", json=body)
            found = answer.json()["choices"][0]["text"]
        return None if found == alone(prompt, count) else f"{i}: {found!r}"

    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=limits) as client:
            return await asyncio.gather(*(one(client, i) for i in range(16)))

    assert [x for x in asyncio.run(run()) if x] == []
    wait_until(lambda: all_free(engine))


def test_numbers_for_the_page_and_for_prometheus(engine, monkeypatch):
    monkeypatch.setattr(watch, "EVERY", 0.0)
    served = app(engine, model_name=NAME)

    async def run():
        async with inside(served) as client:
            before = (await client.get("/stats.json")).json()
            assert before["open"] == before["generated"] == 0 and before["requests"] == []
            asked = [client.post("/v1/completions", json=LONG) for _ in range(3)]
            asked = [asyncio.create_task(x) for x in asked]
            seen = []
            while not all(x.done() for x in asked):
                seen.append((await client.get("/stats.json")).json())
                await asyncio.sleep(0.01)
            after = (await client.get("/stats.json")).json()
            metrics = (await client.get("/metrics")).text
            page = await client.get("/")
            return seen, after, metrics, page

    seen, after, metrics, page = asyncio.run(run())
    total = engine._scheduler.slots.fixed.spec.num_pages
    assert all(x["pool"]["free"] + x["pool"]["held"] == x["pool"]["pages"] == total for x in seen)
    assert max(x["states"].get("running", 0) for x in seen) == 2
    assert max(x["states"].get("waiting", 0) for x in seen) >= 1
    heads = [x["heads"] for x in seen if x["heads"]]
    assert heads and len(heads[0]) == 2 and len(heads[0][0]) == 1 and heads[-1][0][0] >= 1
    assert after["generated"] == 1500 and after["states"] == {} and after["heads"] is None
    assert after["pool"]["held"] == 0 and len(after["rates"]) == 180

    value = dict(re.findall(r"^(diffkv_\S+) ([\d.e+-]+)$", metrics, re.M))
    assert float(value["diffkv_prompt_tokens_total"]) == 15
    assert float(value["diffkv_generated_tokens_total"]) == 1500
    assert float(value['diffkv_finished_requests_total{reason="length"}']) == 3
    assert float(value["diffkv_time_to_first_token_seconds_count"]) == 3
    assert float(value["diffkv_time_per_token_seconds_count"]) == 3
    assert 0 < float(value["diffkv_time_per_token_seconds_sum"]) < 3
    assert float(value['diffkv_pages{state="free"}']) == total
    assert float(value['diffkv_requests{state="running"}']) == 0
    assert float(value["diffkv_parks_total"]) == 0
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|@import""", page.text)
    served.state.driver.close(5)


def test_pages_by_head_are_those_that_are_held(engine):
    """A single request: the sum over the heat map is what the pool has given away."""
    request = engine.submit("x" * 200, max_new_tokens=300)
    while len(request.tokens) < 150:
        engine.step()
    found = engine.stats(heads=True)
    held, (one,) = found["pool"]["held"], found["requests"]
    assert 0 < held == sum(map(sum, found["heads"])) == one["pages"]
    request.cancel()
    engine.step()
    assert engine.stats(heads=True)["heads"] is None and all_free(engine)


@pytest.mark.parametrize("drain", [0.0, 20.0])
def test_shutdown_while_requests_run(drain):
    engine = tiny_engine()
    served = app(engine, model_name=NAME, drain_seconds=drain)

    async def run():
        async with inside(served) as client, served.router.lifespan_context(served):
            whole = asyncio.create_task(client.post("/v1/completions", json=LONG))
            stream = {**LONG, "stream": True}
            stream = asyncio.create_task(client.post("/v1/completions", json=stream))
            while served.state.driver.num_open < 2:
                await asyncio.sleep(0.002)
        late = await client_after(served)
        return await whole, await stream, late

    async def client_after(served):
        async with inside(served) as client:
            health = await client.get("/health")
            return health, await client.post("/v1/completions", json=LONG)

    whole, stream, (health, late) = asyncio.run(run())
    assert health.status_code == late.status_code == 503
    last = stream.text.strip().split("\n\n")[-1]
    if drain:
        assert whole.json()["choices"][0]["text"] == alone("Hello", 500)
        assert last == "data: [DONE]"
    else:
        assert whole.status_code == 503
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert all_free(engine) and not served.state.driver._thread.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_shutdown_of_a_real_server_tells_its_clients(stream):
    engine, told = tiny_engine(), []
    served = app(engine, model_name=NAME)
    body = {**LONG, "n": 40, "stream": stream}

    def ask(address):
        told.append(httpx.post(f"{address}/v1/completions", json=body, timeout=30))

    with on_loopback(served, drain_seconds=0.1) as address:
        client = threading.Thread(target=ask, args=[address])
        client.start()
        wait_until(lambda: served.state.driver.num_open == 40)
    client.join(10)
    (answer,) = told
    assert answer.status_code == (200 if stream else 503)
    last = answer.text.strip().split("\n\n")[-1].removeprefix("data: ")
    assert json.loads(last)["error"]["type"] == "server_error"
    assert all_free(engine) and not served.state.driver._thread.is_alive()
