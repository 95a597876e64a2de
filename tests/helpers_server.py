"""A tiny engine with a tokenizer of characters, and a server of it on loopback."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import httpx
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from diffkv_jax.serving import Engine
from diffkv_jax.testing.tiny import tiny_model
from helpers_text import LETTERS

NAME = "org/tiny"
END = "<end>"


class Letters:
    """Token i is the i-th of `LETTERS`, the last one a special token."""

    def __init__(self):
        ids = {letter: i for i, letter in enumerate((*LETTERS, END))}
        found = Tokenizer(models.WordLevel(ids, unk_token=" "))
        found.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        found.decoder = decoders.Fuse()
        found.add_special_tokens([END])
        self.backend_tokenizer = found

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self.backend_tokenizer.encode(text).ids)

    def apply_chat_template(self, talk, add_generation_prompt: bool) -> dict[str, list[int]]:
        assert add_generation_prompt
        if talk[0]["role"] == "tool":
            raise KeyError("a talk cannot begin with a tool")
        text = "".join(f"<{turn['role']}>{turn['content']}" for turn in talk) + "<assistant>"
        return {"input_ids": self(text).input_ids}


def tiny_engine(**options) -> Engine:
    model, params = tiny_model(vocab=97)
    options = {"max_requests": 2, "max_len": 512, "prefill_chunk": 64, **options}
    return Engine(model, params, tokenizer=Letters(), **options)


@cache
def alone(prompt: str, count: int) -> str:
    """The likeliest text after a prompt, by an engine without a server."""
    engine = tiny_engine()
    request = engine.submit(prompt, max_new_tokens=count)
    for _ in engine.run():
        pass
    return request.text


def all_pages(engine: Engine) -> int:
    return engine._scheduler.slots.fixed.spec.num_pages


def wait_until(true, seconds: float = 20.0) -> None:
    """Until `true()`; fails after so long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def all_free(engine: Engine) -> bool:
    return not engine.busy and engine._scheduler.slots.free == all_pages(engine)


def inside(app) -> httpx.AsyncClient:
    """A client without a network."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://tiny", timeout=60)


@contextmanager
def on_loopback(app, drain_seconds: float = 5.0) -> Iterator[str]:
    """The server's address; shuts down as Ctrl-C does."""
    from diffkv_jax.server.application import Server

    server = Server(app, port=0, log_level="warning", drain_seconds=drain_seconds)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"
