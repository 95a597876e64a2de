"""64 clients for minutes, one in ten cuts the line: nothing is lost, leaked or refused but by 429.
`DIFFKV_JAX_SOAK_MINUTES=5 pytest tests/server/test_server_load.py` goes on for longer.
"""

import asyncio
import os
import random
import time
from collections import Counter

import httpx
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("tokenizers")

MINUTES = float(os.environ.get("DIFFKV_JAX_SOAK_MINUTES", "0.5"))
CLIENTS = 64


async def one_client(http: httpx.AsyncClient, number: int, until: float, seen: Counter) -> None:
    """Asks until then, streamed or not; every tenth answer it does not wait for."""
    draw = random.Random(number)
    while time.monotonic() < until:
        count = draw.randrange(5, 120)
        body = {"model": "org/tiny", "prompt": "hello " * draw.randrange(1, 50)}
        body |= {"max_tokens": count, "temperature": draw.choice([0, 1]), "stream": True}
        if draw.random() < 0.1:
            try:
                async with http.stream("POST", "/v1/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        break
            except httpx.HTTPError:
                pass
            seen["left"] += 1
            continue
        if draw.random() < 0.5:
            answer = await http.post("/v1/completions", json=body | {"stream": False})
            seen[answer.status_code] += 1
            if answer.status_code == 200:
                assert answer.json()["usage"]["completion_tokens"] <= count
                assert answer.json()["choices"][0]["finish_reason"] in ("length", "stop")
        else:
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            seen[answer.status_code] += 1
            if answer.status_code == 200:
                assert lines[-1] == "data: [DONE]" and not any('"error"' in x for x in lines)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            await asyncio.sleep(0.1)


@pytest.mark.slow
@pytest.mark.long
def test_many_clients_for_minutes():
    from diffkv_jax.server import app
    from helpers_server import NAME, all_free, on_loopback, tiny_engine, wait_until

    engine, seen = tiny_engine(max_requests=8), Counter()
    engine.warm_up()

    async def everybody(url: str) -> None:
        until = time.monotonic() + 60 * MINUTES
        limits = httpx.Limits(max_connections=2 * CLIENTS)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(one_client(http, i, until, seen) for i in range(CLIENTS)))

    with on_loopback(app(engine, model_name=NAME, max_queue=40)) as url:
        asyncio.run(everybody(url))
        wait_until(lambda: all_free(engine))
    assert set(seen) <= {200, 429, "left"}, seen
    assert seen[200] > 50 and seen["left"] > 5 and seen[429] > 0, seen
    print(dict(seen))
