"""Log-probabilities and penalties against numbers from outside the engine."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from engines import engine, finish, prompts, tiny
from scipy.special import log_softmax

import diffkv_jax as dkv
from diffkv_jax.decode_loop import State
from diffkv_jax.serving.penalties import NONE, Penalties, changed, changes

FULL = dkv.CompressionPolicy.none()


def plain_logits(tokens: list[int]) -> np.ndarray:
    """Of every position, by the model without a cache."""
    model, params = tiny()
    ids = jnp.asarray([tokens])
    logits, _ = model.apply({"params": params}, ids, jnp.arange(ids.shape[1])[None])
    return np.asarray(logits[0], np.float64)


def test_log_probabilities_are_those_of_the_model():
    e = engine(FULL)
    drawn = dkv.Sample(temperature=1.7)
    asked = [
        e.submit(p, max_new_tokens=n, sampling=drawn, seed=n, logprobs=k)
        for p, n, k in zip(prompts(4, longest=30), (1, 9, 40, 7), (0, 3, 20, 5), strict=True)
    ]
    silent = e.submit([1, 2], max_new_tokens=5)
    events = finish(e)
    assert silent.logprobs == []
    for request, count in zip(asked, (0, 3, 20, 5), strict=True):
        text = [*request.prompt.tolist(), *request.tokens]
        wanted = log_softmax(plain_logits(text), axis=-1)[len(request.prompt) - 1 : -1]
        assert [x.token for x in request.logprobs] == request.tokens
        for found, row in zip(request.logprobs, wanted, strict=True):
            assert found.logprob == pytest.approx(row[found.token], abs=2e-3)
            best = np.sort(row)[::-1][:count]
            np.testing.assert_allclose([x for _, x in found.top], best, atol=2e-3)
            np.testing.assert_allclose([row[i] for i, _ in found.top], best, atol=2e-3)
        told = [x for event in events if event.request is request for x in event.logprobs]
        assert told == request.logprobs


def one(penalties, logits, prompt, answer, drawn=()):
    """`changed` logits of one request, `drawn` in this call; a second one asks for nothing."""
    state = State(jnp.zeros((2, 4), jnp.int32), jnp.array([len(drawn), 0]), jnp.zeros(2, jnp.int32))
    state = state._replace(tokens=state.tokens.at[0, : len(drawn)].set(jnp.array(drawn, int)))
    what = changes([(penalties, prompt, answer), (NONE, [0], [1])], 16)
    found = np.asarray(changed(what, jnp.stack([jnp.asarray(logits)] * 2), state))
    np.testing.assert_array_equal(found[1], np.asarray(logits, np.float32))
    return found[0]


def test_penalties_worked_by_hand():
    logits = [2.0, -2.0, 1.0, 0.5]
    by = partial(one, logits=logits)
    # 0 and 1 are in the prompt, 1 twice in the answer, the second time in this call
    seen = dict(prompt=[0, 1], answer=[1], drawn=[1])
    np.testing.assert_allclose(by(Penalties(repetition=2.0), **seen), [1.0, -4.0, 1.0, 0.5])
    np.testing.assert_allclose(by(Penalties(frequency=0.5), **seen), [2.0, -3.0, 1.0, 0.5])
    np.testing.assert_allclose(by(Penalties(presence=0.5), **seen), [2.0, -2.5, 1.0, 0.5])
    np.testing.assert_allclose(by(Penalties(bias={3: 9, 0: -1}), **seen), [1.0, -2.0, 1.0, 9.5])
    all_of_them = Penalties({0: 2.0}, repetition=2.0, frequency=0.5, presence=0.25)
    np.testing.assert_allclose(by(all_of_them, **seen), [2.0, -5.25, 1.0, 0.5])
    np.testing.assert_array_equal(by(NONE, **seen), np.float32(logits))


def test_repetition_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(size=20).astype(np.float32), rng.integers(0, 20, 8).tolist()
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    wanted = processor(torch.tensor([seen]), torch.tensor(logits)[None])[0].numpy()
    found = one(Penalties(repetition=1.7), logits, seen[:3], seen[3:7], seen[7:])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert (wanted != logits).any()


@pytest.mark.slow
def test_penalised_requests_follow_a_loop_by_hand():
    """Greedy, with the model's logits without a cache, token by token; others are as without."""
    penalties = Penalties({7: -100.0}, repetition=2.0, frequency=1.0, presence=1.5)
    e = engine(FULL)
    request = e.submit([3, 4, 5], max_new_tokens=6, penalties=penalties, stop_token_ids=())
    other = e.submit([3, 4, 5], max_new_tokens=6, stop_token_ids=())
    finish(e)
    text: list[int] = []
    for _ in range(6):
        logits = plain_logits([3, 4, 5, *text])[-1].astype(np.float32)
        text.append(int(np.argmax(one(penalties, logits, [3, 4, 5], text))))
    assert request.tokens == text != other.tokens
    assert (
        other.tokens
        == dkv.generate(*tiny(), [[3, 4, 5]], max_new_tokens=6, stop_token_ids=(), policy=FULL)
        .tokens[0]
        .tolist()
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"repetition": 0},
        {"frequency": 3},
        {"presence": "1"},
        {"bias": {1: 101}},
        {"bias": [1]},
        {"bias": {-1: 1}},
        {"bias": dict.fromkeys(range(301), 1)},
    ],
)
def test_bad_penalties_are_refused(bad):
    with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
        Penalties(**bad)
