"""Ctrl-C in `generate`: it stops soon, and nothing of the conversation is lost."""

import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.interrupt import Held
from diffkv_jax.testing.tiny import prompt, tiny_model

TEXT = [prompt(40)]


@pytest.fixture(autouse=True)
def _python_hears_of_it():
    """A test run in the background may ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    return timer


@pytest.mark.slow
def test_the_loop_stops_and_the_cache_goes_on():
    model, params = tiny_model(max_len=2**17)
    sizes = {
        "max_len": 2**17,
        "memory_budget": "64MiB",
        "policy": dkv.quantized("K4V2", window=16, flush=16),
    }
    generate = lambda *a, **more: dkv.generate(model, params, *a, stop_token_ids=(), **more)  # noqa: E731
    generate(TEXT, max_new_tokens=10, **sizes)  # compiles
    timer = press_after(3.0)
    with pytest.raises(dkv.GenerationInterrupted) as error:
        generate(TEXT, max_new_tokens=100_000, **sizes)
    timer.join()
    out = error.value.output
    count = int(out.lengths[0])
    assert (
        out.finish_reason == ("interrupted",)
        and 0 < count < 100_000
        and isinstance(error.value, KeyboardInterrupt)
    )
    np.testing.assert_array_equal(out.cache.counters.pending, out.tokens[:, count - 1])
    np.testing.assert_array_equal(out.cache.counters.seq_len, [40 + count - 1])
    on = generate([[]], max_new_tokens=30, cache=out.cache)
    whole = generate(TEXT, max_new_tokens=min(count, 400) + 30, **sizes)
    if count <= 400:
        np.testing.assert_array_equal(
            np.concatenate([out.tokens[0, :count], on.tokens[0]]), whole.tokens[0]
        )
    np.testing.assert_array_equal(
        out.tokens[0, : min(count, 400)], whole.tokens[0, : min(count, 400)]
    )


def press_at_chunk(monkeypatch, number: int) -> None:
    """Ctrl-C when the chunk has been read."""
    from diffkv_jax import read_prompts

    calls = []

    def pressed(*given):
        calls.append(0)
        found = chunk(*given)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    chunk = read_prompts.prefill_chunk
    monkeypatch.setattr(read_prompts, "prefill_chunk", pressed)


@pytest.mark.slow
def test_between_chunks_of_a_prompt(monkeypatch):
    """Pressed while the second of four chunks is read: what was read stays, and the rest can
    follow.
    """
    model, params = tiny_model()
    text, sizes = prompt(256), {"prefill_chunk": 64, "max_len": 512, "max_new_tokens": 4}
    press_at_chunk(monkeypatch, 2)
    with pytest.raises(dkv.GenerationInterrupted) as error:
        dkv.generate(model, params, [text], **sizes)
    out = error.value.output
    read = int(out.cache.counters.seq_len[0])
    assert (
        read == 128
        and out.finish_reason == ("interrupted",)
        and out.tokens.shape == (1, 4)
        and not out.lengths.any()
    )
    on = dkv.generate(
        model, params, [text[read:]], cache=out.cache, max_new_tokens=4, prefill_chunk=64
    )
    np.testing.assert_array_equal(on.tokens, dkv.generate(model, params, [text], **sizes).tokens)


def test_in_the_last_chunk_of_a_prompt(monkeypatch):
    """The prompt is read: its first token is there, else an empty prompt could not go on and there
    is no rest to give.
    """
    model, params = tiny_model()
    text, sizes = prompt(256), {"prefill_chunk": 64, "max_len": 512, "max_new_tokens": 4}
    press_at_chunk(monkeypatch, 4)
    with pytest.raises(dkv.GenerationInterrupted) as error:
        dkv.generate(model, params, [text], **sizes)
    out = error.value.output
    assert out.finish_reason == ("interrupted",) and out.lengths.tolist() == [1]
    on = dkv.generate(model, params, [[]], cache=out.cache, max_new_tokens=3)
    whole = dkv.generate(model, params, [text], **sizes).tokens
    np.testing.assert_array_equal(np.concatenate([out.tokens[:, :1], on.tokens], axis=1), whole)


def test_a_handler_of_the_user():
    """It is called, after the call that has the cache, and decides: one that returns lets the work
    go on. A closed `Held` hears nothing.
    """
    cache, heard = dkv.make_cache(tiny_model()[0], None, [64]), []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))

    def call(value, cache):
        taken = jax.jit(lambda c: jax.tree.map(lambda x: x, c), donate_argnums=0)(cache)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert not heard, "while the call has the cache"
        return value + 1, taken

    with Held(0, cache) as held:
        held.update(call)
        assert held.value == 1 and heard == [signal.SIGINT]
        held.close()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    assert heard == [signal.SIGINT]


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.3, [1, 1, 1]), (0.0, [1, 8, 64])], ids=["slow", "fast"]
)
def test_steps_between_looks(monkeypatch, seconds, steps):
    """No call is to take much longer than a quarter of a second, also of a model that takes longer
    for a step.
    """
    from diffkv_jax import decode_loop

    seen = []

    def advance(model, params, cache, state, requests, count):
        seen.append(int(count))
        time.sleep(seconds * seen[-1])
        return state._replace(
            reason=np.array([decode_loop.LENGTH if len(seen) == 3 else decode_loop.RUNNING])
        ), cache

    monkeypatch.setattr(decode_loop, "advance", advance)
    held = Held(
        decode_loop.State(None, None, np.array([decode_loop.RUNNING])),
        dkv.make_cache(tiny_model()[0], None, [64]),
    )
    decode_loop.decode(None, None, held, None)
    assert seen == steps


def test_held_gives_back_what_was_taken():
    """While a call has the cache, the signal waits for it; before that it is raised at once; the
    handler is put back.
    """
    cache = dkv.make_cache(tiny_model()[0], None, [64])
    before = signal.getsignal(signal.SIGINT)

    def call(value, cache):
        taken = jax.jit(lambda c: jax.tree.map(lambda x: x, c), donate_argnums=0)(cache)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return value + 1, taken

    with Held(0, cache) as held:
        with pytest.raises(KeyboardInterrupt):
            held.update(call)
        assert held.value == 1 and not held.cache.counters.seq_len.is_deleted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_in_another_thread_nothing_is_installed():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            dkv.generate(*tiny_model(), TEXT, max_new_tokens=2).lengths.tolist()
        )
    )
    thread.start()
    thread.join()
    assert found == [[2]]
