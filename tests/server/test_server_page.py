"""The page at `/` as a person would look at it, in a headless Chromium: $DIFFKV_JAX_CHROMIUM, or
one on the path.
"""

import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

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


def looked_at(url: str, folder: Path, picture: str = "page.png") -> str:
    """The page's elements after a few seconds; a picture of it in the folder."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--single-process", "--no-zygote"]
    quiet += ["--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}"]
    shown = ["--window-size=1100,1400", "--timeout=6000", url]
    dumped = [f"--screenshot={folder / picture}", "--dump-dom"]
    ran = subprocess.run(
        [str(CHROMIUM), *quiet, *dumped, *shown], capture_output=True, text=True, timeout=90
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def number(page: str, name: str) -> float:
    """What stands in an element."""
    found = re.search(rf'id="{name}"[^>]*>([^<]*)<', page)
    assert found is not None, name
    return float(re.sub(r"[^\d.]", "", found[1]) or "nan")


def test_the_page_shows_what_runs_and_moves(tmp_path):
    from diffkv_jax.server import app
    from helpers_server import NAME, on_loopback, tiny_engine

    engine = tiny_engine()
    with on_loopback(app(engine, model_name=NAME)) as url:
        body = {"model": NAME, "prompt": "abc " * 40, "max_tokens": 300, "n": 4}
        post = threading.Thread(target=lambda: [_completed(url, body) for _ in range(40)])
        post.start()
        pages = [looked_at(url, tmp_path, f"{i}.png") for i in range(2)]
        post.join()
    for page in pages:
        assert NAME in page and number(page, "running") == 2 and number(page, "waiting") >= 1
        heat = re.search(r'<table id="heads">(.*?)</table>', page, re.DOTALL)
        assert heat is not None and heat[1].count("<td") >= 2
    assert number(pages[1], "generated") > number(pages[0], "generated") > 0
    cells = [re.findall(r"<td[^>]*>", page) for page in pages]
    assert cells[0] != cells[1]
    assert all((tmp_path / f"{i}.png").stat().st_size > 10_000 for i in range(2))


def _completed(url: str, body: dict) -> None:
    httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()
