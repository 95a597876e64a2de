"""ExpectedAttention: its scores against the paper's equations in NumPy, the tokens that it keeps
against kvpress on torch.
"""

import dataclasses
from functools import lru_cache

import numpy as np
import pytest
from test_coupled_quantization import POLICY as CODES, calibrated
from tiny_llama import LAYERS, LENGTH, PROMPT, half, kept, models

import diffkv_jax as dkv
from diffkv_jax.batching import as_batch
from diffkv_jax.make_cache import make_cache
from diffkv_jax.methods.expected_attention import ExpectedAttention, QueryStatistics, with_queries
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.native import build
from diffkv_jax.read_prompts import prefill
from diffkv_jax.testing.readback import held_tokens
from diffkv_jax.testing.tiny import tiny_model

torch = pytest.importorskip("torch")
choice = pytest.importorskip("oracles.kvpress_choice")
HEAD_DIM, SINKS, WINDOW = 32, 4, 16
PLAIN = dkv.expected_attention(0.5, window=1)
kept_once = lru_cache(kept)


def of_kvpress(**options):
    return choice.presses().ExpectedAttentionPress(compression_ratio=0.5, n_sink=SINKS, **options)


@pytest.mark.slow
def test_the_tokens_that_kvpress_keeps():
    theirs, _, _ = models(2)
    found = kept_once(PLAIN)
    assert found == choice.kept_by_best(choice.scores(of_kvpress(), theirs, PROMPT), half, 1)
    for without in ("use_covariance", "use_vnorm"):
        assert found != choice.kept_by_best(
            choice.scores(of_kvpress(**{without: False}), theirs, PROMPT), half, 1
        )


@pytest.mark.slow
def test_ada_kv_keeps_what_kvpress_keeps():
    theirs, _, _ = models(2)
    press = of_kvpress()
    score = press.score
    last = np.arange(LENGTH) == LENGTH - 1  # stays here, in the window
    press.score = lambda *arguments: torch.where(torch.as_tensor(last), 1e9, score(*arguments))
    found = kept(dkv.ada_kv(dkv.expected_attention(0.5, window=1), floor=0.2))
    assert found == choice.kept_by_mask(
        choice.presses().AdaKVPress(press, alpha_safeguard=0.2), theirs, PROMPT
    )
    assert any(len(layer[0]) != len(layer[1]) for layer in found)
    assert {sum(map(len, layer)) for layer in found} == {LENGTH}


def projections() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Queries [N, 4, d] before RoPE, keys after it and values [2, N, d] of every layer, from torch,
    float64.
    """
    theirs, _, _ = models(2)
    with torch.no_grad():
        out = theirs(torch.as_tensor(PROMPT)[None], use_cache=True, output_hidden_states=True)
        found = []
        for i, layer in enumerate(theirs.model.layers):
            q = layer.self_attn.q_proj(layer.input_layernorm(out.hidden_states[i]))[0].reshape(
                LENGTH, 4, HEAD_DIM
            )
            held = out.past_key_values.layers[i]
            found.append(
                tuple(x.numpy().astype(np.float64) for x in (q, held.keys[0], held.values[0]))
            )
    return found


def by_the_paper(q, k, v, *, future: int, epsilon: float, covariance: bool = True) -> np.ndarray:
    """The scores [2, N] of one layer's keys; sinks zero."""
    angle = np.arange(LENGTH, LENGTH + future)[:, None] * 10000.0 ** (
        -np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)
    )
    turn = np.zeros((HEAD_DIM, HEAD_DIM))
    for pair, (cos, sin) in enumerate(
        zip(np.cos(angle).mean(axis=0), np.sin(angle).mean(axis=0), strict=True)
    ):
        other = pair + HEAD_DIM // 2
        turn[pair, pair] = turn[other, other] = cos
        turn[pair, other], turn[other, pair] = -sin, sin
    scores = np.zeros((2, LENGTH))
    for head in range(2):
        for query_head in (2 * head, 2 * head + 1):
            rows = q[SINKS:, query_head]
            mu, sigma = turn @ rows.mean(axis=0), turn @ np.cov(rows.T, bias=True) @ turn.T
            keys = k[head, SINKS:]
            exponent = keys @ mu / np.sqrt(HEAD_DIM)
            if covariance:
                exponent += np.array([key @ sigma @ key for key in keys]) / (2 * HEAD_DIM)
            weights = np.exp(exponent - exponent.max())
            scores[head, SINKS:] += weights / weights.sum() / 2
        scores[head, SINKS:] = (scores[head, SINKS:] + epsilon) * np.linalg.norm(
            v[head, SINKS:], axis=-1
        )
    return scores


def scores(chunk: int, **options) -> np.ndarray:
    """The scores [LAYERS, 2, N - WINDOW] of a prompt's tokens in our cache, the sinks' zero."""
    _, model, params = models(2)
    policy = dkv.expected_attention(
        1.0, sinks=SINKS, window=WINDOW, future=60, epsilon=0.001, **options
    )
    cache = make_cache(model, policy, [LENGTH], kernels=Kernels("xla"))
    _, cache = prefill(model, params, cache, PROMPT[None], np.array([LENGTH]), chunk)
    found = np.zeros((LAYERS, 2, LENGTH - WINDOW))
    for layer in range(LAYERS):
        for head in range(2):
            for at, (tier, _, _, score) in held_tokens(cache, layer, 0, head).items():
                if tier != "recent" and at >= SINKS:
                    found[layer, head, at] = score
                assert at >= SINKS or score == np.float32(1e30)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk", "options"),
    [
        (512, {}),
        (64, {}),
        pytest.param(64, {"transform": dkv.Hadamard()}, marks=pytest.mark.slow),
        pytest.param(
            64, {"transform": dkv.WithoutRope()}, marks=(pytest.mark.slow, pytest.mark.long)
        ),
    ],
    ids=str,
)
def test_scores_are_those_of_the_equations(chunk, options):
    """In one chunk and in several, where most keys are read from pages; turned, and without their
    rotary embedding.
    """
    found = scores(chunk, **options)
    layers = projections()
    expected, without = (
        np.stack(
            [
                by_the_paper(*x, future=60, epsilon=0.001, covariance=covariance)[:, :-WINDOW]
                for x in layers
            ]
        )
        for covariance in (True, False)
    )
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-8)
    assert not np.allclose(found, without, rtol=0.1)
    swapped = [by_the_paper(q, v, k, future=60, epsilon=0.001)[:, :-WINDOW] for q, k, v in layers]
    assert not np.allclose(found, swapped, rtol=0.1)


def test_statistics_join():
    """Chunks with several counted rows each, against all rows at once; what was there with count 0
    does not matter.
    """
    rng = np.random.default_rng(0)
    q = (rng.normal(size=(2, 3, 60, 8)) * 3 + 20).astype(np.float32)
    counted = np.arange(60) >= np.array([[4], [33]])
    held = QueryStatistics(np.zeros(2), rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 3, 8, 8)))
    for first in (0, 20, 40):
        held = with_queries(held, q[:, :, first : first + 20], counted[:, first : first + 20])
    np.testing.assert_array_equal(held.seen, [56, 27])
    for row, first in enumerate((4, 33)):
        for head in range(3):
            rows = q[row, head, first:].astype(np.float64)
            np.testing.assert_allclose(held.mean[row, head], rows.mean(axis=0), rtol=1e-5)
            np.testing.assert_allclose(
                held.covariance[row, head], np.cov(rows.T, bias=True), atol=1e-3
            )
    assert np.abs(held.covariance).max() > 5


WRAPPED = dkv.ada_kv(dkv.expected_attention(0.4, epsilon=0.001, window=32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [PLAIN, pytest.param(WRAPPED, marks=(pytest.mark.slow, pytest.mark.long))],
    ids=lambda policy: policy.name,
)
def test_chunks_of_a_prompt_choose_as_one(policy):
    assert kept_once(policy, chunk=128) == kept_once(policy)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(
    build.why_unavailable() is not None, reason="native kernels cannot be built here"
)
def test_keys_of_four_bits_are_scored_nearly_as_exact_ones():
    """On native kernels, in chunks: most keys are read from pages."""
    found = kept(dataclasses.replace(WRAPPED, tiers=("K4V4",)), chunk=128, kernels=Kernels("cpu"))
    for ours, exact in zip(found, kept_once(WRAPPED, chunk=128), strict=True):
        assert sum(map(len, ours)) == 240
        assert sum(len(a & b) for a, b in zip(ours, exact, strict=True)) > 0.9 * 240


def held_after(
    policy: dkv.CompressionPolicy, length: int, calibration: dkv.Calibration | None = None
) -> list[set[int]]:
    """What the heads of a model with two layers hold of a prompt in chunks of 64."""
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    cache = make_cache(model, policy, [length], kernels=Kernels("xla"), calibration=calibration)
    _, cache = prefill(model, params, cache, PROMPT[None, :length], np.array([length]), 64)
    return [set(held_tokens(cache, layer, 0, head)) for layer in range(2) for head in range(2)]


@pytest.mark.slow
@pytest.mark.long
def test_protected_classes_stay():
    ids = tuple(int(token) for token in PROMPT[:40:3])
    policy = dkv.expected_attention(0.5, window=8)
    classed = set(np.flatnonzero(np.isin(PROMPT[:200], ids)).tolist())
    assert 30 < len(classed) < 80
    for held, without in zip(
        held_after(dataclasses.replace(policy, protect=dkv.Protect(sinks=4, token_ids=ids)), 200),
        held_after(policy, 200),
        strict=True,
    ):
        assert len(held) == 100 and classed <= held and not classed <= without


@pytest.mark.slow
@pytest.mark.long
def test_learned_codes_are_scored_nearly_as_exact_keys():
    """Codebooks of the layer's heads, and keys that are kept without their rotary embedding."""
    _, _, calibration = calibrated()
    policy = dkv.expected_attention(0.5)
    learned = dataclasses.replace(
        CODES, score=policy.score, keep=policy.keep, protect=policy.protect
    )
    exact = dataclasses.replace(learned, tiers=("full",))
    for ours, theirs in zip(
        held_after(learned, 200, calibration), held_after(exact, 200), strict=True
    ):
        assert len(ours) == 100 and len(ours & theirs) > 80


@pytest.mark.slow
@pytest.mark.long
def test_rows_and_turns():
    """A row of a batch chooses as the request alone, also after a second prompt; the queries of
    both are counted.
    """
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)

    def turns(prompts: list[np.ndarray]):
        cache = make_cache(
            model,
            dkv.expected_attention(0.5, window=16),
            [330] * len(prompts),
            kernels=Kernels("xla"),
        )
        for rows in (prompts, [prompt[:30] for prompt in prompts]):
            batch, lengths = as_batch(rows, 97)
            _, cache = prefill(model, params, cache, batch, lengths, 64)
        return cache

    together, alone = turns([PROMPT, PROMPT[40:110]]), turns([PROMPT[40:110]])
    np.testing.assert_array_equal(
        np.asarray(together.state.score.seen)[:, :, 0], [[LENGTH - 4 + 30, 70 - 4 + 30]] * 2
    )
    for layer in range(2):
        for head in range(2):
            assert set(held_tokens(together, layer, 1, head)) == set(
                held_tokens(alone, layer, 0, head)
            )


@pytest.mark.slow
def test_nothing_leaves_in_decode():
    model, params = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    policy = dkv.expected_attention(0.5, window=16, flush=8)
    cache = dkv.generate(model, params, PROMPT[None, :100], policy=policy, max_new_tokens=21).cache
    for head in range(2):
        held = set(held_tokens(cache, 1, 0, head))
        assert len(held) == 50 + 20 and {0, 1, 2, 3, *range(84, 120)} <= held


def test_what_cannot_work():
    model, _ = tiny_model(q_heads=4, kv_heads=2, head_dim=32)
    assert make_cache(model, dkv.snapkv(0.5), [40]).state.score is None

    class Untold:
        attention, apply = dataclasses.replace(model.attention, rope=None), model.apply

    with pytest.raises(ValueError, match="the model does not tell it"):
        make_cache(Untold(), dkv.expected_attention(0.5), [40])
    for changes, message in (
        ({"epsilon": -1.0}, "epsilon=-1.0 must be"),
        ({"future": 0}, "future=0 must be"),
        ({"queries": 64}, "looks at no queries"),
    ):
        with pytest.raises(ValueError, match=message):
            ExpectedAttention(**changes)
    policy = dkv.expected_attention(0.5, future=9, epsilon=0.1)
    assert dkv.CompressionPolicy.from_json(policy.to_json()) == policy
