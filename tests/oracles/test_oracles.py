"""Checks of the oracles themselves, on numbers worked by hand."""

import numpy as np
import pytest

pytest.importorskip("torch")  # the simulation is written in it

from diffkv_jax.testing.quantiser import fake_demote, fake_quantise  # noqa: E402

from .algorithm1 import Head  # noqa: E402
from .fake_quant_simulation import (  # noqa: E402
    DROPPED,
    HIGH,
    LOW,
    RECENT,
    LayerCache,
    Policy,
    decide,
    metrics,
    move,
)

# --- Algorithm 1 ---


def test_a_prompt_by_hand():
    # N = 8, W = 2, all rows observe: n = 8, 7, 6, 5, 4, 3; tau_high = 1/8, tau_low = 0.4/8 = 0.05
    head = Head(1.0, 0.4, window=2, observe="all")
    # m = .125 (not below), .1, .04, .1, .125, .1
    tiers = head.prefill([1.0, 0.7, 0.24, 0.5, 0.5, 0.3, 9, 9], 8)
    assert list(tiers.values()) == [
        "high",
        "low",
        "dropped",
        "low",
        "high",
        "low",
        "recent",
        "recent",
    ]
    head = Head(1.0, 0.4, window=2, observe=4)  # n = 4, 4, 4, 4, 4, 3
    tiers = head.prefill([0.5, 0.4, 0.19, 0.21, 0.49, 0.38, 9, 9], 8)
    assert list(tiers.values()) == [
        "high",
        "low",
        "dropped",
        "low",
        "low",
        "high",
        "recent",
        "recent",
    ]


def scored(head, **changes):
    """Probabilities of the next step, 0 unless named: t3=0.5."""
    return {t: changes.get(f"t{t}", 0.0) for t in [*head.held, head.seen]}


def test_a_decode_trace_through_every_branch():
    """W = 2, alpha (1, 0.5), observe 2; the comments give m against tau_high / tau_low of the
    step.
    """
    head = Head(1.0, 0.5, window=2, flush=1, observe=2)
    # N = 6: tau 1/6, 1/12; n = 2: m = .5, .2, .1, .09
    assert list(head.prefill([1.0, 0.4, 0.2, 0.18, 0.5, 0.5], 6).values()) == [
        "high",
        "high",
        "low",
        "low",
        "recent",
        "recent",
    ]
    # P = 7, tau .1429 / .0714, n = 3: t4 joins high at .1667; the least high, t1 at .1333, is
    # demoted
    head.step(scored(head))
    assert head.log[-2:] == [(7, 4, "recent", "high"), (7, 1, "high", "low")]
    # P = 8, tau .125 / .0625, n = 4 (t5: min(3, 4) = 3): t5 at .5/3 joins high; t4 at .5/4 = .125
    # is not below: stays
    head.step(scored(head))
    assert head.log[-1] == (8, 5, "recent", "high") and head.tiers[4] == "high"
    # P = 9, tau .1111 / .0556: t6 (n = 3) at .2/3 = .067 joins low; t3 at .18/5 = .036 is the least
    # of low, dropped; t2 at .04 stays
    head.step(scored(head, t6=0.2))
    assert (
        head.log[-2:] == [(9, 6, "recent", "low"), (9, 3, "low", "dropped")]
        and head.tiers[2] == "low"
    )
    # P = 10, tau .1 / .05: t7 (n = 3) at 0 is dropped; nothing else, although t2 at .2/6 = .033 is
    # below
    head.step(scored(head))
    assert (
        head.log[-1] == (10, 7, "recent", "dropped")
        and head.tiers[2] == "low"
        and len(head.log) == 4 + 6
    )
    # P = 11, tau .0909 / .0455: t8 (n = 3) at .2 joins high; t4 and t5 at .5/7 = .071, a tie in m:
    # the older is demoted
    head.step(scored(head, t8=0.6))
    assert (
        head.log[-2:] == [(11, 8, "recent", "high"), (11, 4, "high", "low")]
        and head.tiers[5] == "high"
    )
    # P = 12, tau .0833 / .0417: t9 at .08 joins low; the least of low, t2 at (.2 + .4) / 8 = .075,
    # stays
    head.step(scored(head, t2=0.4, t4=0.2, t1=0.4, t6=0.4, t9=0.24))
    assert head.log[-1] == (12, 9, "recent", "low") and head.tiers[2] == "low"
    # P = 13, tau .0769 / .0385: t10 at .2 joins high; t5, its S lowered by hand, at .01/9 goes from
    # high to dropped
    next(token for token in head.high if token.position == 5).significance = np.float32(0.01)
    head.step(scored(head, t10=0.6))
    assert head.log[-2:] == [(13, 10, "recent", "high"), (13, 5, "high", "dropped")]


def test_all_victims_at_once():
    # flush = 2: nothing at step 1; at step 2 (P = 8, W = 2) tokens 4 and 5 leave; n = 4 (t5: 3);
    # tau .125 / .0625
    head = Head(1.0, 0.5, window=2, flush=2, observe=2)
    assert (
        list(head.prefill([1.0, 0.4, 0.4, 0.2, 0.5, 0.1], 6).values())
        == ["high"] * 3 + ["low"] + ["recent"] * 2
    )
    before = dict(head.tiers)
    assert {**before, 6: "recent"} == head.step(scored(head))
    next(token for token in head.high if token.position == 2).significance = np.float32(0.2)
    # m: t0 .25, t1 .1, t2 .05, t3 .05, t4 .125 (not below), t5 .033
    assert list(head.step(scored(head)).values()) == [
        "high",
        "low",
        "dropped",
        "dropped",
        "high",
        "dropped",
        "recent",
        "recent",
    ]


def test_nothing_is_promoted():
    head = Head(1.0, 0.5, window=1, flush=2, observe=2)
    head.prefill([0.5, 0.5, 1.0], 3)  # m .25 against 1/3 and 1/6
    assert head.tiers[0] == "low"
    for _ in range(4):
        head.step(scored(head, t0=1.0))
    assert head.tiers[0] == "low" and head.mean(head.low[0]) > 1 / head.seen


def test_short_sequences_stay_recent():
    head = Head(1.0, 0.5, window=8, flush=1)
    head.prefill([0.0] * 3, 3)
    for _ in range(5):
        assert set(head.step(scored(head)).values()) == {"recent"}
    assert head.step(scored(head))[0] == "dropped"  # P = 9


# --- the simulation's decisions against Algorithm 1, and its cache ---

NAMES = ["recent", "high", "low", "dropped"]


@pytest.mark.parametrize("flush", [1, 3, 8])
@pytest.mark.parametrize("observe", [5, "all"])
def test_simulation_decides_as_algorithm1(flush, observe):
    rng = np.random.default_rng(flush)
    policy = Policy(1.0, 0.3, window=6, flush=flush)
    head = Head(1.0, 0.3, window=6, flush=flush, observe=observe)
    sums = (rng.pareto(1.0, 30) * 0.05 * (30 if observe == "all" else 5) / 30).astype(np.float32)
    head.prefill(sums, 30)
    seen, observed, total, tiers = 30, head.observed, sums.copy(), np.zeros((1, 30), np.uint8)
    for step in range(61):
        if step:
            weights = rng.pareto(1.0, seen + 1) * np.append(tiers[0] != DROPPED, True)
            p = (weights / weights.sum()).astype(np.float32)
            head.step({t: p[t] for t in [*head.held, seen]})
            total, tiers = np.append(total, np.float32(0)) + p, np.pad(tiers, ((0, 0), (0, 1)))
            seen, observed = seen + 1, observed + 1
        if step % flush == 0:
            mean = total / np.minimum(seen - np.arange(seen), observed).astype(np.float32)
            tiers = decide(tiers, mean[None], seen, policy, after_prompt=step == 0)
        assert [NAMES[tier] for tier in tiers[0]] == list(head.tiers.values())
    assert {"high", "low", "dropped", "recent"} == set(head.tiers.values())


def reads(policy, journey, swapped=False):
    """What a cache of one head, four tokens of 64 channels reads after its tokens went through the
    tiers of `journey`.
    """
    import torch

    exact = tuple(
        torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 4, 64)).astype(np.float32))
        for seed in (0, 1)
    )
    exact = exact[::-1] if swapped else exact
    cache = LayerCache(
        exact,
        tuple(tensor.clone() for tensor in exact),
        torch.zeros(1, 4),
        np.zeros((1, 4), np.uint8),
    )
    for tiers in journey:
        move(cache, np.array([tiers], np.uint8), policy)
    return [tensor[0].numpy() for tensor in exact], [tensor[0].numpy() for tensor in cache.read]


def test_forms_a_reader_sees():
    journey = [[HIGH, HIGH, LOW, RECENT], [HIGH, LOW, LOW, RECENT], [HIGH, LOW, DROPPED, RECENT]]
    (keys, values), (read_keys, read_values) = reads(Policy(1, 0), journey[:2])
    for exact, read, high, low in ((keys, read_keys, 8, 4), (values, read_values, 4, 2)):
        np.testing.assert_array_equal(read[0], fake_quantise(exact[0], high))
        np.testing.assert_array_equal(read[1], fake_demote(exact[1], high, 1, low, 1))
        np.testing.assert_array_equal(read[2], fake_quantise(exact[2], low))
        np.testing.assert_array_equal(read[3], exact[3])
    errors = [np.abs(read_keys[0] - keys[0]).max(), np.abs(read_values[0] - values[0]).max()]
    assert errors[0] * 8 < errors[1]  # keys have the more bits; swapping them shows
    _, (swapped_keys, swapped_values) = reads(Policy(1, 0), journey, swapped=True)
    assert (swapped_keys[:3] != read_values[:3]).any() and (
        swapped_values[:3] != read_keys[:3]
    ).any()


def test_metrics_by_hand():
    full, other = np.log([[0.5, 0.5], [0.8, 0.2]]), np.log([[0.5, 0.5], [0.4, 0.6]])
    result = metrics(full, other, [0, 1])
    second = 0.8 * np.log(2) + 0.2 * np.log(1 / 3)
    assert result["mean_kl"] == pytest.approx(second / 2) and result["top1"] == 0.5
    assert result["perplexity_full"] == pytest.approx((0.5 * 0.2) ** -0.5) and result[
        "perplexity"
    ] == pytest.approx((0.5 * 0.6) ** -0.5)
