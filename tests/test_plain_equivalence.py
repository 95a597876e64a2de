"""`CompressionPolicy.none()` is plain attention: same logits in prefill and decode, for every
geometry and prompt length.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax import CompressionPolicy, KVCache, generate, make_cache
from diffkv_jax.evaluation import quality, teacher_forced
from diffkv_jax.read_prompts import prefill
from diffkv_jax.steps.jitted import decode_step
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.tiny import prompt, tiny_model

TOLERANCE = 1e-4
CHUNK = 64
LENGTHS = np.array([64, 300, 5, 257])  # the second and the last take five chunks
STEPS = 24
POLICY = CompressionPolicy.none(window=16, flush=8)  # three compression events in STEPS
GEOMETRIES = {
    "group1_dim64": {"q_heads": 2, "kv_heads": 2, "head_dim": 64},
    "group3_dim96": {"q_heads": 3, "kv_heads": 1, "head_dim": 96},
    "group6_dim128": {"q_heads": 6, "kv_heads": 1, "head_dim": 128},
    "group16_dim256": {"q_heads": 16, "kv_heads": 1, "head_dim": 256},
    "window_less_than_chunk_and_global": {
        "q_heads": 6,
        "kv_heads": 2,
        "layers": 3,
        "windows": (40, None, 40),
    },
    "all_windows_more_than_chunk": {"q_heads": 3, "kv_heads": 1, "windows": (100, 100)},
}


@partial(jax.jit, static_argnums=0)
def plain(model, params, tokens):
    """Logits [R, T, vocab] of the model's own attention, without a cache."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.apply({"params": params}, tokens, positions)[0]


@partial(jax.jit, static_argnums=0)
def feed(model, params, cache, tokens):
    """Logits [S, R, vocab] of the decode steps `tokens` int32 [S, R], and the cache."""

    def step(cache, token):
        logits, cache = decode_step(model, params, cache, token, jnp.full(token.shape, True))
        return cache, logits

    cache, logits = jax.lax.scan(step, cache, tokens)
    return logits, cache


def texts(lengths: np.ndarray, more: int) -> np.ndarray:
    """int32 [R, longest + more]; a prompt and `more` tokens behind it in each row, then padding."""
    rows = np.zeros((len(lengths), max(lengths) + more), np.int32)
    for i, n in enumerate(lengths):
        rows[i, : n + more] = prompt(n + more, seed=i)
    return rows


def decoded(model, params, cache: KVCache, rows: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Logits [R, STEPS, vocab] of feeding what follows the prompts."""
    behind = np.stack([row[n : n + STEPS] for row, n in zip(rows, lengths, strict=True)])
    logits, _ = feed(model, params, cache, jnp.asarray(behind.T))
    return np.asarray(logits).swapaxes(0, 1)


def after(logits: np.ndarray, lengths: np.ndarray, steps: int) -> np.ndarray:
    """Of logits [R, T, vocab] the `steps` rows that start with the first token behind each
    prompt.
    """
    return np.stack([row[n : n + steps] for row, n in zip(logits, lengths, strict=True)])


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def check_geometry(model, params) -> None:
    rows = texts(LENGTHS, STEPS)
    wanted = np.asarray(plain(model, params, jnp.asarray(rows)))
    logits, cache = prefill(
        model, params, make_cache(model, POLICY, LENGTHS + STEPS), rows, LENGTHS, CHUNK
    )
    last = wanted[np.arange(len(LENGTHS)), LENGTHS - 1]
    assert error(logits, last) <= TOLERANCE, "chunked prefill"
    got, wanted_behind = decoded(model, params, cache, rows, LENGTHS), after(wanted, LENGTHS, STEPS)
    assert error(got, wanted_behind) <= TOLERANCE, "decode"
    assert error(jax.nn.log_softmax(got), jax.nn.log_softmax(wanted_behind)) <= TOLERANCE, (
        "decode, log-probabilities"
    )
    short = np.array([64, 1, 17, 40])
    logits, _ = prefill(
        model, params, make_cache(model, POLICY, LENGTHS + STEPS), rows, short, CHUNK
    )
    wanted = np.asarray(
        plain(
            model, params, jnp.asarray(np.where(np.arange(rows.shape[1]) < short[:, None], rows, 0))
        )
    )
    assert error(logits, wanted[np.arange(len(short)), short - 1]) <= TOLERANCE, (
        "prompt of one chunk"
    )


MARKS = {name: pytest.mark.slow for name in GEOMETRIES if "dim96" not in name}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in GEOMETRIES]
)
def test_equals_plain_attention(name):
    model, params = tiny_model(**GEOMETRIES[name])
    check_geometry(model, params)


@pytest.mark.slow
def test_equals_plain_attention_with_soft_cap():
    model, params = tiny_model(**GEOMETRIES["window_less_than_chunk_and_global"])
    capped = model.clone(config=dataclasses.replace(model.config, attn_logit_softcapping=2.0))
    rows = jnp.asarray(texts(LENGTHS, STEPS))
    assert error(plain(model, params, rows), plain(capped, params, rows)) > 100 * TOLERANCE, (
        "the cap must matter"
    )
    check_geometry(capped, params)


@pytest.fixture(scope="module")
def after_prompt():
    """Model, parameters, texts, plain logits behind the prompts, and a function that gives a fresh
    cache after the prompts.
    """
    model, params = tiny_model(**GEOMETRIES["group3_dim96"])
    rows = texts(LENGTHS, STEPS)
    wanted = after(np.asarray(plain(model, params, jnp.asarray(rows))), LENGTHS, STEPS)

    def fresh() -> KVCache:
        return prefill(
            model, params, make_cache(model, POLICY, LENGTHS + STEPS), rows, LENGTHS, CHUNK
        )[1]

    return model, params, rows, wanted, fresh


def swap_pages(cache: KVCache) -> KVCache:
    """The first page of requests 1 and 3, layer 0, exchanged."""
    table = cache.stored.page_table
    one, other = table[0, 1, 0, 0], table[0, 3, 0, 0]
    return with_part(
        cache, "stored.page_table", table.at[0, 1, 0, 0].set(other).at[0, 3, 0, 0].set(one)
    )


def shift_recent(cache: KVCache) -> KVCache:
    """The recent window one slot too far left: the oldest token is lost, an empty slot counts."""
    k, v = (jnp.roll(x, -1, axis=3) for x in cache.recent[:2])
    return with_part(cache, "recent", cache.recent._replace(k=k, v=v))


def swap_k_and_v(cache: KVCache) -> KVCache:
    return with_part(cache, "recent", cache.recent._replace(k=cache.recent.v, v=cache.recent.k))


@pytest.mark.parametrize("damage", [swap_pages, shift_recent, swap_k_and_v])
def test_comparison_rejects_damaged_cache(after_prompt, damage):
    model, params, rows, wanted, fresh = after_prompt
    assert error(decoded(model, params, fresh(), rows, LENGTHS), wanted) <= TOLERANCE
    assert error(decoded(model, params, damage(fresh()), rows, LENGTHS), wanted) > 100 * TOLERANCE


@pytest.mark.slow
def test_every_prompt_length_from_1_to_200():
    """Eight batches of 25 prompts with lengths 8 apart, one compile; the greedy tokens are those of
    plain attention.
    """
    new, longest = 16, 200
    model, params = tiny_model()
    policy = CompressionPolicy.none(flush=8)
    for first in range(1, 9):
        lengths = np.arange(first, longest + 1, 8)
        rows = texts(lengths, 0)
        cache = make_cache(model, policy, [longest + new] * len(lengths))
        out = generate(
            model, params, rows, lengths, cache=cache, max_new_tokens=new, prefill_chunk=CHUNK
        )
        assert set(out.finish_reason) == {"length"}
        text = np.zeros((len(lengths), longest + new), np.int32)
        for i, n in enumerate(lengths):
            text[i, : n + new] = np.concatenate([rows[i, :n], out.tokens[i]])
        logits = np.asarray(plain(model, params, jnp.asarray(text)))
        wanted = after(logits.argmax(axis=-1), lengths - 1, new)
        np.testing.assert_array_equal(out.tokens, wanted, err_msg=f"lengths {lengths}")


@pytest.mark.slow
def test_teacher_forced_equals_plain_attention():
    model, params = tiny_model()
    context, steps = 256, 40
    rows = texts(np.full(2, context), steps)
    got, cache = teacher_forced(
        model, params, rows, context, CompressionPolicy.none(), prefill_chunk=CHUNK
    )
    wanted = np.asarray(jax.nn.log_softmax(plain(model, params, jnp.asarray(rows))))[:, context:]
    assert got.shape == wanted.shape and error(got, wanted) <= TOLERANCE
    np.testing.assert_array_equal(cache.counters.seq_len, context + steps)
    following = np.roll(rows, -1, axis=1)[:, context:]
    result = quality(wanted, got, following)
    assert np.abs(result.kl).max() < 1e-6 and result.top1.min() == 1
    np.testing.assert_allclose(result.perplexity, result.perplexity_full, rtol=1e-5)
