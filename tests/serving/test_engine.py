"""The engine: a request's tokens are those of `generate()` alone, whatever else is there."""

import signal

import jax
import numpy as np
import pytest
from engines import DIFFKV, WINDOW, alone, check_pool_whole, engine, finish, prompts, tiny

import diffkv_jax as dkv
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.serving import programs
from diffkv_jax.serving.engine import Engine
from diffkv_jax.serving.scheduler import Scheduler
from diffkv_jax.testing.tiny import tiny_latent_model, tiny_model

native = pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")


def mixed(e: Engine, count: int = 9, seed: int = 0, most: int = 60, **how):
    """Requests of any length, every other one drawn."""
    rng = np.random.default_rng(seed)
    draws = dkv.Sample(temperature=0.8, top_k=20)
    return [
        e.submit(
            prompt,
            max_new_tokens=int(rng.integers(1, most)),
            sampling=draws if i % 2 else None,
            seed=i,
            **how,
        )
        for i, prompt in enumerate(prompts(count, seed))
    ]


def check_alone(requests, policy, loaded=None, **options):
    for request in requests:
        found = request.tokens, request.finish_reason
        assert found == alone(request, policy, loaded, **options), request


POLICIES = {
    "diffkv": DIFFKV,
    "drops": dkv.diffkv(1.0, 0.5, queries=16, **WINDOW),
    "none": dkv.CompressionPolicy.none(),
    "snapkv": dkv.snapkv(0.5, window=16),
    "h2o": dkv.h2o(0.5, **WINDOW),
    "key_norm": dkv.key_norm(0.5, **WINDOW),
    "kvzip": dkv.kvzip(0.5, **WINDOW),
    "pyramidkv": dkv.pyramidkv(0.5, window=16),
    "tova": dkv.tova(0.5, **WINDOW),
}


SELDOM = ("h2o", "key_norm", "pyramidkv", "tova")
LONG = (pytest.mark.slow, pytest.mark.long)


@native
@pytest.mark.daily(8)
@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=LONG if one in SELDOM else ()) for one in POLICIES],
)
def test_tokens_are_those_of_generate_alone(name):
    e = engine(POLICIES[name])
    requests = mixed(e)
    events = finish(e)
    check_alone(requests, POLICIES[name])
    for request in requests:
        told = [event for event in events if event.request is request]
        assert sum((list(event.tokens) for event in told), []) == request.tokens
        assert [e.finish_reason for e in told if e.finish_reason] == [request.finish_reason]
    assert max(len(event.tokens) for event in events) > 1  # several steps between two visits
    check_pool_whole(e)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["windows", "all windows", *(pytest.param(x, marks=LONG) for x in ("latent", "xla", "pairs"))],
)
def test_other_models_and_kernels(kind):
    """Plain XLA rows agree with the request alone within rounding: greedy tokens do here."""
    loaded, policy, options = tiny(), DIFFKV, {"implementation": "xla"}
    if kind == "windows":
        loaded = tiny_model(layers=3, kv_heads=2, q_heads=4, windows=(16, None, 16))
    if kind == "all windows":
        loaded = tiny_model(layers=2, kv_heads=2, q_heads=4, windows=(16, 24))
    if kind == "latent":
        loaded, policy = tiny_latent_model(), dkv.quantized("K8V8", **WINDOW)
    if kind == "pairs":
        loaded, policy = tiny_model(layers=4, kv_heads=2, q_heads=4), dkv.minicache(**WINDOW)
    e = engine(policy, loaded, **options)
    e.warm_up()
    requests = [e.submit(prompt, max_new_tokens=30) for prompt in prompts(6, 3, longest=60)]
    finish(e)
    check_alone(requests, policy, loaded, **options)
    check_pool_whole(e)


@pytest.fixture
def hopeful(monkeypatch):
    """Everybody is let in at once."""
    monkeypatch.setattr(Scheduler, "_has_room", lambda *_: True)
    monkeypatch.setattr(Scheduler, "_fits", lambda *_: True)


@native
@pytest.mark.parametrize("name", ["diffkv", pytest.param("tova", marks=pytest.mark.slow)])
def test_parked_requests_come_back_bit_for_bit(hopeful, name):
    e = engine(POLICIES[name], memory_budget="0.55MiB" if name == "diffkv" else "0.95MiB")
    rng = np.random.default_rng(0)
    requests = [
        e.submit(prompt, max_new_tokens=int(rng.integers(60, 200)), sampling="sample", seed=i)
        for i, prompt in enumerate(prompts(10))
    ]
    states = set()
    while e.busy:
        e.step()
        states |= {request.state for request in requests}
    assert "parked" in states and sum(request.parks for request in requests) > 2
    check_alone(requests, POLICIES[name])
    check_pool_whole(e)


@native
def test_a_request_that_the_pool_cannot_hold_alone_ends_with_cache_full(hopeful):
    e = engine(dkv.diffkv(0.0, 0.0, queries=16, **WINDOW), memory_budget="0.6MiB")
    pages = e._scheduler.slots.free
    # every token high: 32 of them a page in each of four heads
    most = (pages // 4) * 32
    request = e.submit(prompts(1)[0], max_new_tokens=min(500 - 150, most + 200))
    other = e.submit([1, 2, 3], max_new_tokens=4)
    finish(e)
    assert request.finish_reason == "cache_full"
    assert len(request.tokens) > 0 and other.finish_reason == "length"
    check_pool_whole(e)


@native
def test_another_value_compiles_nothing():
    e = engine()
    for width in (1, 2, 4):
        for _ in range(width):
            e.submit(prompts(1, longest=60)[0], max_new_tokens=40)
        finish(e)
    mixed(e, 12, seed=1)
    finish(e)
    names = ("read", "decode", "first_token", "release")
    before = {name: getattr(programs, name)._cache_size() for name in names}
    mixed(
        e,
        12,
        seed=1,
        stop_token_ids=[5, 6],
        logprobs=3,
        penalties={"repetition": 1.3, "bias": {4: 2.0}},
        policy=dkv.diffkv(1.3, 0.2, queries=16, **WINDOW),
    )
    finish(e)
    assert {name: getattr(programs, name)._cache_size() for name in names} == before


def test_a_cancelled_request_gives_its_pages_back_at_the_next_step():
    e = engine()
    requests = [e.submit(prompt, max_new_tokens=300) for prompt in prompts(8)]
    for _ in range(12):
        e.step()
    assert {"running", "waiting"} <= {request.state for request in requests}
    assert e._scheduler.slots.free < e._scheduler.slots.fixed.spec.num_pages
    for request in requests:
        request.cancel()
    events = e.step()
    assert all(request.finish_reason == "cancelled" for request in requests)
    assert {event.finish_reason for event in events} == {"cancelled"} and len(events) == 8
    assert not e.busy
    check_pool_whole(e)


def test_who_is_cancelled_while_others_are_taken_out_is_not_lost(monkeypatch):
    e = engine()
    requests = [e.submit(prompt, max_new_tokens=300) for prompt in prompts(8)]
    for _ in range(12):
        e.step()
    free_slots = e._scheduler.slots.free_slots

    def meanwhile(slots):
        for request in requests:
            request.cancel()  # as another thread does
        free_slots(slots)

    monkeypatch.setattr(e._scheduler.slots, "free_slots", meanwhile)
    requests[0].cancel()
    finish(e)
    assert [request.finish_reason for request in requests] == ["cancelled"] * 8
    check_pool_whole(e)


@native
def test_requests_that_stall_together_leave_no_page_behind(hopeful):
    """Nobody waits, so that calls go on past the first that stalls."""
    e = engine(memory_budget="0.55MiB")
    rng = np.random.default_rng(0)
    requests = [
        e.submit(rng.integers(0, 97, 40).tolist(), max_new_tokens=200, stop_token_ids=())
        for _ in range(4)
    ]
    finish(e)
    assert sum(request.parks for request in requests) >= 2
    check_pool_whole(e)


def test_events_that_were_not_taken_come_later():
    e = engine()
    requests = [e.submit([i, 2, 3], max_new_tokens=1) for i in range(3)]
    first = next(e.run())
    heard = [first.request, *(event.request for event in e.run())]
    assert sorted(r.number for r in heard) == [r.number for r in requests] and not e.busy


def test_larger_priorities_come_before_those_that_are_parked(hopeful):
    e = engine(memory_budget="0.55MiB")
    first = [e.submit(prompt, max_new_tokens=200) for prompt in prompts(4)]
    while not any(request.state == "parked" for request in first):
        e.step()
    urgent = e.submit([1, 2, 3], max_new_tokens=3, priority=9)
    while urgent.finish_reason is None:
        e.step()
    assert any(request.finish_reason is None for request in first)
    finish(e)


def test_larger_priorities_come_first():
    e = engine(max_requests=1)
    requests = [e.submit([1, 2, 3], max_new_tokens=2, priority=i) for i in (0, 2, 1, 2)]
    ended = [event.request for event in finish(e) if event.finish_reason]
    assert ended == [requests[1], requests[3], requests[2], requests[0]]


@native
def test_thresholds_of_a_request_of_its_own():
    e = engine()
    own = dkv.diffkv(1.5, 0.6, queries=16, **WINDOW)
    requests = [e.submit(p, max_new_tokens=40, policy=own) for p in prompts(3, longest=200)]
    others = mixed(e, 3)
    finish(e)
    check_alone(requests, own)
    check_alone(others, DIFFKV)
    assert alone(requests[0], own) != alone(requests[0], DIFFKV)
    for policy in (dkv.snapkv(0.5), dkv.quantized("K8V4"), dkv.diffkv(1.0, 0.0)):
        with pytest.raises(ValueError, match="make another engine"):
            e.submit([1, 2], policy=policy)


def test_bad_requests_are_refused_before_anything_runs():
    e = engine()
    for bad, error in [
        (dict(prompt=[]), "empty prompt"),
        (dict(prompt=[97]), "outside the vocabulary"),
        (dict(prompt=[[1, 2]]), "flat list"),
        (dict(prompt="text"), "tokenizer="),
        (dict(prompt=[1], stop="."), "tokenizer="),
        (dict(prompt=[1], max_new_tokens=0), "max_new_tokens"),
        (dict(prompt=[1], max_new_tokens=513), "max_len"),
        (dict(prompt=[1] * 600), "max_len"),
        (dict(prompt=[1], logprobs=21), "logprobs"),
        (dict(prompt=[1], stop_token_ids=list(range(40))), "at most 32"),
        (dict(prompt=[1], penalties={"bias": {97: 1.0}}), "below 97"),
        (dict(prompt=[1], sampling={"heat": 1}), "sampling"),
        (dict(prompt=[1], priority="high"), "priority"),
        (dict(prompt=[1], seed="x"), "seed"),
        (dict(prompt=[1], seed=jax.random.key(0, impl="rbg")), "default kind"),
    ]:
        with pytest.raises((TypeError, ValueError), match=error):
            e.submit(**bad)
    assert not e.busy
    with pytest.raises(TypeError, match="memory_budgt"):
        engine(memory_budgt="1MiB")
    with pytest.raises(ValueError, match="smallest budget"):
        engine(memory_budget="0.2MiB")
    with pytest.raises(ValueError, match="prefill_chunk"):
        engine(prefill_chunk=33)
    with pytest.raises(ValueError, match="queries"):
        engine(prefill_chunk=16, policy=dkv.diffkv(queries=32))


def test_one_thread_steps():
    e = engine()
    e._stepping.acquire()
    with pytest.raises(RuntimeError, match="one thread"):
        e.step()


def test_numbers_that_are_not_finite_end_one_request_alone(caplog):
    model, params = tiny()
    table = params["embed_tokens"]["embedding"]
    poisoned = params | {"embed_tokens": {"embedding": table.at[50].set(np.nan)}}
    e = engine(loaded=(model, poisoned))
    bad = [e.submit([1, 50, 3] * 20, max_new_tokens=9) for _ in range(2)]
    finish(e)
    assert "Request(0" in caplog.text and "Request(1" in caplog.text
    good = [e.submit([5, 6] * n, max_new_tokens=30) for n in (10, 40, 60)]
    late = e.submit([1, 2, 3], max_new_tokens=30, penalties={"bias": {50: 100.0}})
    finish(e)
    assert {request.finish_reason for request in bad} == {"error"} and not bad[0].tokens
    assert late.finish_reason == "error" and late.tokens == [50]
    assert "layer 0" in caplog.text and "Request(5" in caplog.text
    check_alone(good, DIFFKV, (model, poisoned))
    check_pool_whole(e)


def test_after_a_step_has_failed_the_engine_says_so(monkeypatch):
    e = engine()
    e.submit([1, 2, 3], max_new_tokens=4)
    monkeypatch.setattr(programs, "read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        e.step()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="an earlier step failed with ZeroDivisionError"):
        e.step()


def test_ctrl_c_in_a_step_comes_after_it_and_loses_nothing(monkeypatch):
    e = engine()
    request = e.submit([1, 2, 3], max_new_tokens=30)
    read = programs.read

    def pressed(*given):
        signal.raise_signal(signal.SIGINT)
        return read(*given)

    monkeypatch.setattr(programs, "read", pressed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            e.step()
    finally:
        signal.signal(signal.SIGINT, before)
    events = finish(e)
    assert sum((list(event.tokens) for event in events), []) == request.tokens
    check_alone([request], DIFFKV)
