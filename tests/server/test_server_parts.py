"""Parts of the server by themselves: how ends are told, what is counted, `serve`."""

import re

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("tokenizers")

import uvicorn

from diffkv_jax.server import serve
from diffkv_jax.server.driver import GRACE
from diffkv_jax.server.errors import ApiError
from diffkv_jax.server.metrics import Metrics
from diffkv_jax.server.told import Choice
from diffkv_jax.serving import Event
from helpers_server import NAME, tiny_engine


class Ended:
    """A request that has been parked twice."""

    def __init__(self, tokens: int):
        self.prompt, self.tokens, self.parks = [0] * 5, [0] * tokens, 2
        self.times = {"submitted": 1.0, "first": 3.0, "end": 7.0}


def ended(reason: str, tokens: int = 0) -> Event:
    """The last event of a request."""
    request = Ended(tokens)
    return Event(request, (0,) * tokens, "", (), reason)


@pytest.mark.parametrize(
    ("reason", "tokens", "told"),
    [
        ("eos", 0, "stop"),
        ("stop", 2, "stop"),
        ("length", 2, "length"),
        ("cache_full", 2, "length"),
        ("cache_full", 0, 503),
        ("error", 2, 500),
        ("cancelled", 2, 503),
    ],
)
def test_how_ends_are_told(reason, tokens, told):
    choice = Choice(0)
    if isinstance(told, str):
        choice.take(ended(reason, tokens))
        assert choice.reason == told
        return
    with pytest.raises(ApiError) as caught:
        choice.take(ended(reason, tokens))
    assert caught.value.status == told


def test_what_is_counted():
    metrics = Metrics()
    stats = {
        "requests": [{"state": "parked", "parks": 3}, {"state": "waiting", "parks": 0}],
        "pool": {"free": 7, "held": 2},
    }
    metrics.step([ended("length", 5), ended("cancelled")], stats)
    found = dict(re.findall(r"^diffkv_(\S+) ([\d.]+)$", metrics.text().decode(), re.M))
    expected = {
        "parks_total": 7,
        "prompt_tokens_total": 5,
        "generated_tokens_total": 5,
        'requests{state="parked"}': 1,
        'requests{state="running"}': 0,
        'pages{state="free"}': 7,
        'pages{state="held"}': 2,
        'finished_requests_total{reason="length"}': 1,
        'finished_requests_total{reason="cancelled"}': 1,
        "time_to_first_token_seconds_sum": 2,
        "time_per_token_seconds_sum": 1,  # 4 seconds for the 4 after the first
        "time_per_token_seconds_count": 1,
    }
    assert {name: float(found[name]) for name in expected} == expected


def test_serve_closes_what_it_made(monkeypatch):
    seen = {}

    def run(server):
        seen.update(vars(server.config), driver=server.config.app.state.driver)
        assert seen["driver"]._thread.is_alive()
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    serve(tiny_engine(), model_name=NAME, port=1234, drain_seconds=2.5)
    assert seen["driver"].closing and not seen["driver"]._thread.is_alive()
    assert (seen["host"], seen["port"]) == ("127.0.0.1", 1234)
    assert seen["timeout_graceful_shutdown"] > 2.5 + 2 * GRACE
