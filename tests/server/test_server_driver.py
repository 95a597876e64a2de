"""The thread that steps: no event is lost, nobody waits in vain."""

import asyncio
import time
from contextlib import aclosing

import pytest

pytest.importorskip("starlette")
pytest.importorskip("tokenizers")

from diffkv_jax.server import Driver
from diffkv_jax.server.driver import Closed, EngineFailed, Full
from helpers_server import all_free, alone, tiny_engine, wait_until

LONG = {"prompt": "long", "max_new_tokens": 400}


@pytest.fixture
def driver(engine):
    found = Driver(engine)
    yield found
    found.close(0)
    assert not found._thread.is_alive() and all_free(engine)


async def text_of(driver, *requests, **options) -> str:
    return "".join([event.text async for event in driver.stream(*requests, **options)])


def test_events_before_somebody_listens_are_kept(driver):
    request = driver.submit("late", max_new_tokens=20)
    wait_until(lambda: request.finish_reason)
    assert asyncio.run(text_of(driver, request)) == alone("late", 20)
    assert not driver._mail and driver.num_open == 0


def test_events_of_a_step_during_the_submission_are_kept(driver, monkeypatch):
    """The thread is already stepping when a request is queued, before it has a mailbox."""
    for request in [driver.submit("both", max_new_tokens=20) for _ in range(2)]:
        asyncio.run(text_of(driver, request))  # compiles what is run below
    other, submit = driver.submit(**LONG), driver.engine.submit
    wait_until(lambda: other.tokens)

    def slow(**options):
        request = submit(**options)
        time.sleep(0.3)
        return request

    monkeypatch.setattr(driver.engine, "submit", slow)
    request = driver.submit("race", max_new_tokens=20)
    assert asyncio.run(text_of(driver, request, seconds=10)) == alone("race", 20)
    driver.drop([other])


def test_several_requests_in_one_stream(driver):
    async def run():
        asked = [{"prompt": text, "max_new_tokens": 9} for text in ("one", "two", "three")]
        found = []
        await asyncio.to_thread(driver.submit_all, asked, found)
        texts = dict.fromkeys(found, "")
        async for event in driver.stream(*found):
            texts[event.request] += event.text
        assert [*texts.values()] == [alone(one["prompt"], 9) for one in asked]

    asyncio.run(run())


def test_all_or_none_are_submitted(driver):
    found = []
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        driver.submit_all([LONG, {"prompt": "x", "max_new_tokens": 0}], found)
    assert not found and driver.num_open == 0
    wait_until(lambda: all_free(driver.engine))


def test_who_leaves_early_frees_the_pages(driver):
    async def run():
        request = await asyncio.to_thread(lambda: driver.submit(**LONG))
        async with aclosing(driver.stream(request)) as events:
            async for _ in events:
                assert not all_free(driver.engine)
                break
        assert request.cancelled
        return request

    request = asyncio.run(run())
    wait_until(lambda: all_free(driver.engine))
    assert request.finish_reason == "cancelled"


def test_a_task_that_is_cancelled_frees_the_pages(driver):
    async def run():
        request = await asyncio.to_thread(lambda: driver.submit(**LONG))
        task = asyncio.create_task(text_of(driver, request))
        while not request.tokens:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return request

    request = asyncio.run(run())
    wait_until(lambda: request.finish_reason == "cancelled" and all_free(driver.engine))


def test_too_long_is_a_timeout_and_cancelled(driver):
    request = driver.submit(**LONG)
    with pytest.raises(TimeoutError):
        asyncio.run(text_of(driver, request, seconds=0.01))
    wait_until(lambda: request.finish_reason == "cancelled")


def test_no_more_than_may_be_open(engine):
    driver = Driver(engine, most_open=2)
    found = []
    with pytest.raises(Full, match="at most 2"):
        driver.submit_all([LONG] * 3, found)
    driver.submit_all([LONG] * 2, found)
    with pytest.raises(Full):
        driver.submit("x")
    driver.drop(found)
    wait_until(lambda: driver.num_open == 0)
    assert asyncio.run(text_of(driver, driver.submit("x", max_new_tokens=3))) == alone("x", 3)
    driver.close(0)


def test_close_waits_for_what_runs(engine):
    driver = Driver(engine)
    request = driver.submit("drain", max_new_tokens=100)
    driver.close(20)
    assert request.finish_reason == "length" and len(request.tokens) == 100
    assert asyncio.run(text_of(driver, request)) == alone("drain", 100)
    with pytest.raises(Closed):
        driver.submit("x")


def test_close_cancels_what_runs_too_long(engine):
    driver = Driver(engine)

    async def run():
        requests = [await asyncio.to_thread(lambda: driver.submit(**LONG)) for _ in range(5)]
        streams = [asyncio.create_task(text_of(driver, one)) for one in requests]
        while not requests[0].tokens:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(driver.close, 0)
        await asyncio.gather(*streams)
        return requests

    requests = asyncio.run(run())
    assert {one.finish_reason for one in requests} == {"cancelled"}
    assert not driver._thread.is_alive() and all_free(engine)


@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError(), SystemExit(1)])
def test_a_step_that_raises_is_told_to_everyone(error):
    engine = tiny_engine()
    driver = Driver(engine)

    def broken():
        raise error

    engine.step = broken
    requests = [driver.submit("x")]
    wait_until(lambda: driver.failed is error)
    with pytest.raises(EngineFailed, match=type(error).__name__):
        asyncio.run(text_of(driver, *requests))
    with pytest.raises(EngineFailed):
        driver.submit("x")
    driver.close(20)  # at once: nothing is open
    assert not driver._thread.is_alive() and not driver._mail


def test_a_loop_that_is_gone_harms_nobody(driver):
    async def begin():
        request = await asyncio.to_thread(lambda: driver.submit("gone", max_new_tokens=200))
        stream = driver.stream(request)
        await anext(stream)
        return request, stream

    loop = asyncio.new_event_loop()
    request, stream = loop.run_until_complete(begin())
    loop.close()
    wait_until(lambda: request.finish_reason)
    assert driver.failed is None
    with pytest.raises(StopIteration):
        stream.aclose().send(None)
    assert not driver._mail
