"""The page at `/` as a person would look at it, in a headless Chromium: $DIFFKV_JAX_CHROMIUM, or
one on the path.
"""

import os
import re
import shutil
import threading

import httpx
import pytest

import diffkv_jax as dkv

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("tokenizers")

CHROMIUM = os.environ.get("DIFFKV_JAX_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: $DIFFKV_JAX_CHROMIUM names one"),
]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    plain = ["--no-zygote", "--single-process", "--in-process-gpu", "--use-angle=swiftshader"]
    with sync_api.sync_playwright() as found:
        running = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *plain])
        yield running
        running.close()


def number(page, name: str) -> float:
    """What stands in an element."""
    return float(re.sub(r"[^\d.]", "", page.locator(f"#{name}").inner_text()) or "nan")


def cells(page) -> list[str]:
    """Colours of the heat map of layers and heads."""
    style = "cells => cells.map(cell => getComputedStyle(cell).backgroundColor)"
    return page.locator("#heads td").evaluate_all(style)


def test_the_page_shows_what_runs_and_moves(browser, tmp_path):
    from diffkv_jax.server import app
    from helpers_server import NAME, on_loopback, tiny_engine

    engine = tiny_engine(policy=dkv.diffkv(queries=32, window=16, flush=8))
    with on_loopback(app(engine, model_name=NAME)) as url:
        body = {"model": NAME, "prompt": "abc " * 60, "max_tokens": 200, "n": 4}
        stop = threading.Event()
        post = threading.Thread(target=_ask_on, args=(url, body, stop))
        post.start()
        try:
            page, errors = browser.new_page(viewport={"width": 1100, "height": 1200}), []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(url)
            page.wait_for_function(
                "document.querySelectorAll('#heads td').length > 0", timeout=30_000
            )
            assert NAME in page.inner_text("body")
            assert number(page, "running") >= 1 and number(page, "waiting") >= 1
            assert len(cells(page)) >= 2
            first, colours, seen = number(page, "generated"), cells(page), set()
            for _ in range(8):
                page.wait_for_timeout(700)
                seen.add(tuple(cells(page)))
            assert len(seen | {tuple(colours)}) > 1, "the heat map does not move"
            assert number(page, "generated") > first > 0
            picture = page.screenshot(path=os.environ.get("DIFFKV_JAX_PICTURE"))
            assert len(picture) > 10_000 and errors == []
            page.set_viewport_size({"width": 380, "height": 800})  # a phone
            assert page.evaluate("document.documentElement.scrollWidth") <= 380
        finally:
            stop.set()
            post.join()


def _ask_on(url: str, body: dict, stop: threading.Event) -> None:
    while not stop.is_set():
        httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()
