"""Several calls with one cache: turns of a token, reading only, rows that rest, draws, owners,
threads.
"""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax import decode_loop
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.tiny import prompt, tiny_model

TEXTS = [prompt(90, 1), prompt(40, 2)]
POLICIES = {
    "none": dkv.CompressionPolicy.none(window=16, flush=8),
    "diffkv": dkv.diffkv(1.0, 0.3, window=16, flush=8),
    "tova": dkv.tova(32, window=8, flush=4),
}
CASES = [
    pytest.param(policy, id=name, marks=[] if name == "diffkv" else pytest.mark.slow)
    for name, policy in POLICIES.items()
]
SIZES = {"max_len": 256, "prefill_chunk": 64}


@pytest.fixture(scope="module")
def generate():
    return partial(dkv.generate, *tiny_model())


@pytest.mark.parametrize("policy", CASES)
def test_turns_of_one_token_equal_one_call(generate, policy):
    """More turns than an event takes, so that the schedule of events has to go on."""
    whole = generate(TEXTS, policy=policy, max_new_tokens=20, **SIZES)
    turn = generate(TEXTS, policy=policy, max_new_tokens=1, **SIZES)
    rows = [turn.tokens]
    for _ in range(19):
        turn = generate([[], []], max_new_tokens=1, cache=turn.cache)
        rows.append(turn.tokens)
    np.testing.assert_array_equal(np.concatenate(rows, axis=1), whole.tokens)
    for one, other in zip(*map(jax.tree.leaves, (turn.cache, whole.cache)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_draws_depend_on_the_position(generate):
    """One key: turns of two tokens draw what one call draws, and a turn does not repeat the noise
    of the turn before.
    """
    # every token alike: the draw shows the noise alone
    flat = {"sampling": dkv.Sample(temperature=1e6), "key": 7}
    whole = generate(TEXTS, max_new_tokens=12, **flat, **SIZES)
    turn = generate(TEXTS, max_new_tokens=2, **flat, **SIZES)
    rows = [turn.tokens]
    for _ in range(5):
        turn = generate([[], []], max_new_tokens=2, cache=turn.cache, **flat)
        rows.append(turn.tokens)
    np.testing.assert_array_equal(np.concatenate(rows, axis=1), whole.tokens)
    assert any((rows[0] != other).any() for other in rows[1:])


def test_zero_new_tokens_only_read(generate, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(decode_loop, "advance", None)  # not even compiled
        read = generate(TEXTS, max_new_tokens=0, **SIZES)
    assert (
        read.tokens.shape == (2, 0)
        and read.finish_reason == ("length",) * 2
        and not read.lengths.any()
    )
    np.testing.assert_array_equal(read.cache.counters.seq_len, [90, 40])
    np.testing.assert_array_equal(read.cache.counters.pending, [-1, -1])
    questions = [[5, 6], [7]]
    answer = generate(questions, max_new_tokens=6, cache=read.cache)
    whole = generate(
        [[*t, *q] for t, q in zip(TEXTS, questions, strict=True)], max_new_tokens=6, **SIZES
    )
    np.testing.assert_array_equal(answer.tokens, whole.tokens)


def test_turns_of_any_length_share_a_program(generate):
    first = generate(TEXTS, max_new_tokens=2, **SIZES)
    compiled = decode_loop.advance._cache_size()
    generate([[], []], max_new_tokens=30, cache=first.cache)
    assert decode_loop.advance._cache_size() == compiled


def test_zero_new_tokens_of_a_pending_one_change_nothing(generate):
    first = generate(TEXTS, max_new_tokens=3, **SIZES)
    seen, pending = (
        np.asarray(first.cache.counters.seq_len),
        np.asarray(first.cache.counters.pending),
    )
    again = generate([[], []], max_new_tokens=0, cache=first.cache)
    np.testing.assert_array_equal(again.cache.counters.seq_len, seen)
    np.testing.assert_array_equal(again.cache.counters.pending, pending)


@pytest.mark.slow
@pytest.mark.parametrize("policy", CASES)
def test_a_row_rests_and_another_goes_on(generate, policy):
    """Each row is what it is alone: one rests, one goes on without new text, one has a prompt; then
    all go on.
    """
    texts = [*TEXTS, prompt(20, 3)]

    def turns(rows):
        out = generate([texts[i] for i in rows], policy=policy, max_new_tokens=5, **SIZES)
        second = [([5, 6], [], None)[i] for i in rows]
        results = [out]
        if any(one is not None for one in second):
            results.append(generate(second, max_new_tokens=6, cache=out.cache))
        third = [([], [8, 9, 10], [])[i] for i in rows]
        return [*results, generate(third, max_new_tokens=9, cache=results[-1].cache)]

    together = turns([0, 1, 2])
    assert together[1].finish_reason == ("length", "length", "resting") and together[
        1
    ].lengths.tolist() == [6, 6, 0]
    for row in range(3):
        alone = turns([row])
        found = [out.tokens[row] for out in together if out.lengths[row]]
        for got, wanted in zip(found, alone, strict=True):
            np.testing.assert_array_equal(got, wanted.tokens[0], err_msg=f"row {row}")
        ours, wanted = together[-1].cache, alone[-1].cache
        np.testing.assert_array_equal(
            ours.stored.tier_len[:, row], wanted.stored.tier_len[:, 0], err_msg=f"row {row}"
        )
        for name in ("seq_len", "recent_len", "pending", "steps"):
            got, one = getattr(ours.counters, name)[row], getattr(wanted.counters, name)[0]
            assert int(got) == int(one), f"{name} of row {row}"


def test_what_cannot_go_on(generate):
    with pytest.raises(ValueError, match="prompt 1 has length 0 and no generated token is pending"):
        generate([[1], []])
    with pytest.raises(ValueError, match="every prompt is None"):
        generate([None, None])
    out = generate(TEXTS, max_new_tokens=0, **SIZES)
    with pytest.raises(ValueError, match="prompt 0 has length 0 and no generated token is pending"):
        generate([[], [1]], cache=out.cache)
    generate([[3], None], max_new_tokens=1, cache=out.cache)


def test_a_cache_of_other_parameters(generate):
    out = generate(TEXTS, max_new_tokens=2, **SIZES)
    with pytest.raises(ValueError, match="made with other parameters"):
        dkv.generate(*tiny_model(seed=1), [[], []], cache=out.cache)
    generate([[], []], max_new_tokens=1, cache=out.cache)


def test_one_cache_in_two_threads(generate):
    """One of the calls has it, the others are refused; nothing else is raised."""
    cache = generate(TEXTS, max_new_tokens=2, **SIZES).cache
    start, results = threading.Barrier(4), []

    def call():
        start.wait()
        try:
            results.append(generate([[], []], max_new_tokens=40, cache=cache))
        except ValueError as error:
            results.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [one for one in results if isinstance(one, str)]
    assert len(refused) == 3 and all(
        "another thread" in one or "given to an earlier call" in one for one in refused
    ), refused


@pytest.mark.slow
def test_sampling_for_each_request(generate):
    """A list of samplings: every row is what it is alone, greedy ones beside drawn ones."""
    samplings = [dkv.Greedy(), dkv.Sample(0.7, top_k=5), dkv.Sample(1.5, top_p=0.8, min_p=0.05)]
    texts, keys = [*TEXTS, prompt(60, 4)], jax.random.split(jax.random.key(1), 3)
    together = generate(texts, sampling=samplings, key=keys, max_new_tokens=8, **SIZES)
    for row, (text, sampling) in enumerate(zip(texts, samplings, strict=True)):
        alone = generate(
            [text], sampling=sampling, key=keys[row : row + 1], max_new_tokens=8, **SIZES
        )
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
    assert (generate([texts[1]], max_new_tokens=8, **SIZES).tokens != together.tokens[1]).any(), (
        "the draw must show"
    )


@pytest.mark.slow
def test_pages_of_nobody_may_hold_anything(generate):
    """Bytes of NaN in every free page change nothing: a request that failed leaves them behind."""

    def poisoned(cache: dkv.KVCache) -> dkv.KVCache:
        def ones(x):
            bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
            return jax.lax.bitcast_convert_type(
                jnp.full(x.shape, jnp.iinfo(bits).max, bits), x.dtype
            )

        return with_part(cache, "stored.pages", jax.tree.map(ones, cache.stored.pages))

    for policy in POLICIES.values():
        caches = [
            dkv.make_cache(tiny_model()[0], policy, [200, 200], max_len=256) for _ in range(2)
        ]
        plain, after = (
            generate(TEXTS, max_new_tokens=20, cache=c) for c in (caches[0], poisoned(caches[1]))
        )
        np.testing.assert_array_equal(plain.tokens, after.tokens, err_msg=policy.name)
        assert after.finish_reason == ("length",) * 2
