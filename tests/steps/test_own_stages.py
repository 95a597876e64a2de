"""Verbs of scores and keep rules in prompts of several chunks, batches and decode, by stages that
stand outside of the library.
"""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.pallas_kernels.native.build import why_unavailable
from diffkv_jax.policy.ranking import ALL
from diffkv_jax.testing.tiny import prompt, tiny_model

NATIVE = pytest.mark.skipif(why_unavailable() is not None, reason="no C++ compiler")
SHORT = dkv.Schedule(window=8, flush=4)
PROMPTS = [prompt(60, 1), prompt(41, 2)]


def kept(policy: dkv.CompressionPolicy, prompts=PROMPTS, new: int = 1, **options) -> list[set[int]]:
    """What the first head of the first layer holds of each request."""
    options = {"implementation": "xla", "prefill_chunk": 16, "max_len": 128} | options
    out = dkv.generate(*tiny_model(), prompts, policy=policy, max_new_tokens=new, **options)
    return [set(request[0].tolist()) for request in dkv.kept_positions(out.cache)[0]]


class Late(dkv.KeyScore):
    """The later the better, all scores negative or -inf."""

    def enter(self, tokens):
        score = (tokens.position - 1000).astype(jnp.float32)
        return jnp.where(tokens.position % 7 == 0, -jnp.inf, score)


class Line(dkv.Keep):
    """What scores at least -970 stays: no look at other scores."""

    line: float = dkv.data(default=-970.0)
    ranks: ClassVar[bool] = False

    def thresholds(self, view):
        return jnp.stack([self.line, self.line], axis=-1)


def test_nothing_goes_before_the_policy_decides():
    """In chunks of 16: what the first chunks let out of the window is there at the end."""
    policy = dkv.CompressionPolicy("line", score=Late(), keep=Line(), schedule=SHORT)
    for held, tokens in zip(kept(policy), PROMPTS, strict=True):
        n = len(tokens)
        expected = {p for p in range(n - 8) if p >= 30 and p % 7} | set(range(n - 8, n))
        assert held == expected
    everything = dkv.CompressionPolicy("all", score=Late(), keep=Line(line=ALL), schedule=SHORT)
    assert kept(everything) == [set(range(len(tokens))) for tokens in PROMPTS]


class Even(dkv.Keep):
    """Tokens at even positions stay."""

    ranks: ClassVar[bool] = False

    def mark(self, state, view, chooses):
        return state, jnp.where(view.position % 2 == 0, 1.0, -1.0)


@pytest.mark.parametrize("new", [1, 13])
def test_protected_tokens_stay_whatever_is_marked(new: int):
    policy = dkv.CompressionPolicy(
        "even", score=Late(), keep=Even(), protect=dkv.Protect(sinks=6), schedule=SHORT
    )
    for held, tokens in zip(kept(policy, new=new), PROMPTS, strict=True):
        last = max(held) + 1
        assert set(range(6)) <= held and last == len(tokens) + new - 1
        going = {p for p in held if 6 <= p < len(tokens) - 8}
        assert going == {p for p in range(6, len(tokens) - 8) if p % 2 == 0}


class Turned(Late):
    """What enters, the other way round: -1000 - score."""

    def enter(self, tokens):
        return (tokens.position - 1000).astype(jnp.float32)

    def rescore(self, state, view):
        return -1000 - view.scores


def test_rescore_sees_what_enters():
    """After a prompt of one chunk: the earliest stay where the latest have the larger scores."""
    policy = dkv.CompressionPolicy("x", score=Turned(), keep=dkv.Budget(keep=20), schedule=SHORT)
    for held, tokens in zip(kept(policy, prefill_chunk=64), PROMPTS, strict=True):
        n = len(tokens)
        assert held == {*range(12), *range(n - 8, n)}


class Fading(dkv.Score):
    """Attention, halved each time that the policy decides."""

    def rescore(self, state, view):
        return view.scores / 2


@pytest.mark.slow
def test_a_request_is_rescored_as_alone():
    """Events of one request leave the scores of the others alone: they come at other steps."""
    score = Fading(queries=16, reduce="mean")
    policy = dkv.CompressionPolicy("x", score=score, keep=dkv.Budget(keep=24), schedule=SHORT)
    model, params = tiny_model()
    options = {"implementation": "xla", "max_len": 128}

    def turns(rows: list[int]):
        prompts = [[PROMPTS[0], PROMPTS[1]][row] for row in rows]
        cache = dkv.generate(
            model, params, prompts, policy=policy, max_new_tokens=2, **options
        ).cache
        again = [[prompt(9, 5), None][row] for row in rows]  # the second one rests
        if any(tokens is not None for tokens in again):
            cache = dkv.generate(model, params, again, cache=cache, max_new_tokens=6).cache
        return np.asarray(cache.stored.pages.significance), dkv.kept_positions(cache), cache

    _, both, cache = turns([0, 1])
    _, alone, _ = turns([1])
    assert both[0][1][0].tolist() == alone[0][0][0].tolist()
    cases = (cache, 1), (turns([1])[2], 0)
    scores = [
        np.sort(np.asarray(c.stored.pages.significance)[used(c, row)].ravel())[-12:]
        for c, row in cases
    ]
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5)


def used(cache: dkv.KVCache, row: int) -> np.ndarray:
    """Pages of a request in the first layer."""
    pages = -(-int(cache.stored.tier_len[0, row, 0, 0]) // cache.spec.layout.tokens_per_page(0))
    return np.asarray(cache.stored.page_table)[0, row, 0, :pages]


def test_budgets_in_bytes_that_shrink_with_depth():
    """The last of many layers has less than a token of the smallest budget."""
    policy = dkv.CompressionPolicy(
        "x",
        score=dkv.KeyNorm(),
        keep=dkv.Budget(keep="200KiB", layers="pyramid"),
        schedule=SHORT,
    )
    cache = dkv.make_cache(tiny_model(layers=4)[0], policy, [300])
    amounts = np.asarray(cache.policy.keep.keep)[:, 0, 0]
    assert amounts[0] > amounts[-1] > 0


def with_verb(base: type, verb: str, function):
    return type("Own", (base,), {verb: function, "in_decode": True, "__module__": __name__})()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {
                "score": with_verb(
                    dkv.KeyScore, "enter", lambda self, t: jnp.zeros(t.valid.shape[1])
                )
            },
            r"Own.enter must give float32 \[B, n\] = \[2, \d+\], gave \[\d+\]",
        ),
        (
            {"score": with_verb(Late, "rescore", lambda self, state, view: view.scores[:, :3])},
            r"Own.rescore must give float32 \[B, n\] = \[2, \d+\], gave \[2, 3\]",
        ),
        (
            {"keep": with_verb(Line, "thresholds", lambda self, view: self.line)},
            r"Own.thresholds must give float32 \[B, 2\] = \[2, 2\], gave \[2\]",
        ),
        (
            {"keep": with_verb(Even, "mark", lambda self, state, view, chooses: (state, 1.0))},
            r"Own.mark must give float32 \[B, n\] = \[2, \d+\], gave \[\]",
        ),
    ],
    ids=["enter", "rescore", "thresholds", "mark"],
)
def test_a_verb_that_gives_another_shape_is_named(stage, message: str):
    policy = {"score": Late(), "keep": dkv.Budget(keep=20), "schedule": SHORT} | stage
    with pytest.raises(ValueError, match=message):
        kept(dkv.CompressionPolicy("x", **policy))


@pytest.mark.daily(3)
@pytest.mark.parametrize("implementation", ["xla", pytest.param("cpu", marks=NATIVE)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
def test_numbers_of_another_type_are_scores(dtype: str, implementation: str):
    """Tokens 0 to 11, whose scores any of the types can hold, and the window."""
    score = with_verb(dkv.KeyScore, "enter", lambda self, t: (-t.position).astype(dtype))
    policy = dkv.CompressionPolicy("x", score=score, keep=dkv.Budget(keep=20), schedule=SHORT)
    held = kept(policy, PROMPTS[:1], implementation=implementation)
    assert held == [{*range(12), *range(52, 60)}]


@pytest.mark.parametrize("verb", ["enter", "rescore"])
def test_nan_is_the_lowest_score(verb: str):
    def scores(self, *given):
        position = given[-1].position
        return jnp.where(position < 30, jnp.nan, -position.astype(jnp.float32))

    score = with_verb(dkv.KeyScore, verb, scores)
    policy = dkv.CompressionPolicy("x", score=score, keep=dkv.Budget(keep=20), schedule=SHORT)
    assert kept(policy, PROMPTS[:1], prefill_chunk=64) == [{*range(30, 42), *range(52, 60)}]
