"""A row of a batch gives the same tokens as the same request alone, whatever its neighbours are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax import (
    CompressionPolicy,
    GenerateOutput,
    Greedy,
    Sample,
    diffkv,
    generate,
    make_cache,
    memory_report,
)
from diffkv_jax.decode_loop import advance
from diffkv_jax.sampling import next_token, rules
from diffkv_jax.steps.jitted import prefill_chunk
from diffkv_jax.testing.tiny import prompt, tiny_model

LENGTHS = (40, 64, 150, 333)  # shorter than the window, one chunk, three and six chunks
CHUNK, NEW, MAX_LEN = 64, 72, 544  # two compression events in 71 decode steps
POLICY = diffkv(1.0, 0.3)
SAMPLE = Sample(temperature=1.3, top_k=40, top_p=0.9, min_p=0.02)


@pytest.fixture(scope="module")
def model():
    return tiny_model(q_heads=6, kv_heads=2)


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    return [prompt(n, seed=n) for n in LENGTHS]


def run(model, prompts, policy: CompressionPolicy, **arguments) -> GenerateOutput:
    """`generate` with caches of one size, so that all calls with as many rows share a compiled
    program.
    """
    cache = make_cache(model[0], policy, [MAX_LEN] * len(prompts))
    arguments = {
        "max_new_tokens": NEW,
        "prefill_chunk": CHUNK,
        "stop_token_ids": (),
        "cache": cache,
    } | arguments
    return generate(*model, prompts, **arguments)


def check_rows(batch: GenerateOutput, alone: list[GenerateOutput]) -> None:
    for row, single in enumerate(alone):
        np.testing.assert_array_equal(batch.tokens[row], single.tokens[0], err_msg=f"row {row}")
        assert (
            batch.lengths[row] == single.lengths[0]
            and batch.finish_reason[row] == single.finish_reason[0]
        )
        np.testing.assert_array_equal(
            batch.cache.stored.tier_len[:, row],
            single.cache.stored.tier_len[:, 0],
            err_msg=f"tokens a tier of row {row}",
        )


@pytest.fixture(scope="module")
def greedy(model, prompts) -> tuple[GenerateOutput, list[GenerateOutput]]:
    """All prompts as one batch, and each alone."""
    return run(model, prompts, POLICY), [run(model, [p], POLICY) for p in prompts]


@pytest.mark.slow
def test_greedy(greedy):
    batch, alone = greedy
    check_rows(batch, alone)
    report = memory_report(batch.cache)
    assert (report.dropped[:, 2:].sum(axis=(0, 2)) > 0).all() and (
        report.tokens[..., :2].sum(axis=(0, 1, 2)) > 0
    ).all()


@pytest.mark.slow
def test_row_order_and_neighbours_do_not_matter(model, prompts, greedy):
    order = [2, 0, 3, 1]
    again = run(model, [prompts[i] for i in order], POLICY)
    np.testing.assert_array_equal(again.tokens, greedy[0].tokens[order])
    other = run(model, [prompts[0], prompt(200, 7), prompts[2], prompt(99, 8)], POLICY)
    np.testing.assert_array_equal(other.tokens[[0, 2]], greedy[0].tokens[[0, 2]])
    assert (other.tokens[[1, 3]] != greedy[0].tokens[[1, 3]]).any(), (
        "the comparison must see another prompt"
    )


@pytest.mark.slow
def test_thresholds_per_request(model, prompts, greedy):
    high, low = (0.5, 1.0, 2.0, 4.0), (0.0, 0.3, 1.0, 0.1)
    # compiled here: a test before may have dropped compiled programs
    for some in (prompts, prompts[:1]):
        run(model, some, POLICY)
    compiled = advance._cache_size(), prefill_chunk._cache_size()
    batch = run(model, prompts, diffkv([[[a] for a in high]], [[[a] for a in low]]))
    alone = [run(model, [p], diffkv(a, b)) for p, a, b in zip(prompts, high, low, strict=True)]
    check_rows(batch, alone)
    assert (advance._cache_size(), prefill_chunk._cache_size()) == compiled, (
        "other thresholds must not compile anything"
    )
    # the one row whose thresholds are those of POLICY
    np.testing.assert_array_equal(batch.tokens[1], greedy[0].tokens[1])
    assert (
        np.asarray(batch.cache.stored.tier_len)[:, 2:]
        != np.asarray(greedy[0].cache.stored.tier_len)[:, 2:]
    ).any()


@pytest.mark.slow
def test_sampling_with_a_key_for_each_request(model, prompts):
    keys = jax.random.split(jax.random.key(3), len(prompts))
    batch = run(model, prompts, POLICY, sampling=SAMPLE, key=keys)
    check_rows(
        batch,
        [
            run(model, [p], POLICY, sampling=SAMPLE, key=keys[i : i + 1])
            for i, p in enumerate(prompts)
        ],
    )
    key = jax.random.key(5)
    batch = run(model, prompts, POLICY, sampling=SAMPLE, key=key)
    folded = [
        run(model, [p], POLICY, sampling=SAMPLE, key=jax.random.fold_in(key, i)[None])
        for i, p in enumerate(prompts)
    ]
    check_rows(batch, folded)
    again = run(model, prompts, POLICY, sampling=SAMPLE, key=jax.random.key(6))
    assert (again.tokens != batch.tokens).any()


TURNS = {
    "same lengths": ((40, 63, 50, 45), False),
    "an idle chunk": ((40, 63, 100, 50), False),
    "a row that ended early": ((40, 63, 50, 45), True),
}


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "stops"), TURNS.values(), ids=TURNS)
def test_second_turn(model, prompts, greedy, lengths, stops):
    """Two turns as a batch and alone."""
    stop = int(greedy[0].tokens[2, 5]) if stops else None
    turn2 = [prompt(n, seed=900 + n) for n in lengths]

    def two_turns(first, second) -> GenerateOutput:
        out = run(model, first, POLICY, stop_token_ids=() if stop is None else (stop,))
        return run(model, second, POLICY, cache=out.cache)

    check_rows(
        two_turns(prompts, turn2),
        [two_turns([p], [q]) for p, q in zip(prompts, turn2, strict=True)],
    )


@pytest.mark.slow
def test_plain_rows():
    """The plain cache, one layer: quick."""
    model, policy = tiny_model(layers=1), CompressionPolicy.none(window=16, flush=8)
    prompts = [prompt(n, seed=n) for n in (3, 16, 5, 12)]
    batch = run(model, prompts, policy, max_new_tokens=16, prefill_chunk=16)
    check_rows(
        batch, [run(model, [p], policy, max_new_tokens=16, prefill_chunk=16) for p in prompts]
    )


@pytest.mark.slow
def test_keys_of_rows(key):
    """`next_token` draws for a row what it draws for that row alone."""
    drawn_from = jax.jit(next_token)
    logits = jax.random.normal(key, (5, 97)) * 2
    keys = jax.random.split(key, 5)
    for sampling in (Greedy(), SAMPLE):
        drawn = drawn_from(rules([sampling] * 5), logits, keys)
        alone = jnp.concatenate(
            [drawn_from(rules([sampling]), logits[i : i + 1], keys[i : i + 1]) for i in range(5)]
        )
        np.testing.assert_array_equal(drawn, alone)
