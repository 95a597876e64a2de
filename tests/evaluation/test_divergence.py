"""Figures of a compressed run and their standard errors."""

import numpy as np
import pytest

from diffkv_jax.evaluation import Quality, quality, teacher_forced
from diffkv_jax.testing.tiny import prompt, tiny_model


def drawn(texts: int, steps: int, neighbours: int = 1, seed: int = 0) -> Quality:
    """Independent divergences of mean one, each repeated at `neighbours` positions."""
    rng = np.random.default_rng(seed)
    kl = np.repeat(rng.exponential(size=(texts, steps // neighbours)), neighbours, axis=1)
    return Quality(kl, (kl < 1).astype(float), kl + 1, kl + 2)


def test_errors_are_those_of_repeated_measurements():
    runs = [drawn(2, 512, seed=seed).summary() for seed in range(40)]
    spread = np.std([run.mean_kl.value for run in runs])
    said = np.mean([run.mean_kl.error for run in runs])
    assert 0.7 < said / spread < 1.4
    spread = np.std([run.perplexity.value for run in runs])
    assert 0.7 < np.mean([run.perplexity.error for run in runs]) / spread < 1.4


def test_neighbours_that_agree_say_less():
    """Blocks: positions drawn one by one would claim a quarter of the error."""
    found = drawn(1, 1024, neighbours=16)
    assert found.summary(block=1).mean_kl.error < 0.5 * found.summary().mean_kl.error


def test_figures():
    found = drawn(3, 200)
    summary = found.summary()
    assert summary.mean_kl.value == pytest.approx(found.kl.mean())
    assert summary.p99_kl.value == pytest.approx(np.quantile(found.kl, 0.99))
    assert summary.top1.value == pytest.approx(found.top1.mean())
    assert summary.perplexity_full.value == pytest.approx(np.exp(found.nll_full.mean()))
    one = found.text(1)
    assert one.kl.shape == (1, 200) and one.perplexity == found.perplexity[1]
    with pytest.raises(ValueError, match="row=3 must be an integer from 0 to 2"):
        found.text(3)


def test_over_texts():
    kl = np.repeat([[1.0], [3.0], [5.0]], 64, axis=1)  # no spread within a text
    found = Quality(kl, kl, kl, kl)
    assert found.summary("texts").mean_kl.error == pytest.approx(
        np.std([1, 3, 5], ddof=1) / 3**0.5, rel=0.1
    )
    assert found.text(0).summary().mean_kl.error == 0
    assert np.isnan(found.text(0).summary("texts").mean_kl.error)
    with pytest.raises(ValueError, match="over='blocks' must be one of|'positions' or 'texts'"):
        found.summary("blocks")


def test_estimates_say_their_error_where_they_know_it():
    few = drawn(1, 20).summary()
    assert f"{few.mean_kl:.2f}" == f"{few.mean_kl.value:.2f}"
    assert "±" in f"{drawn(1, 64).summary().mean_kl:.2f}"


def test_the_row_after_the_prompt_comes_first():
    model, params = tiny_model(layers=1, head_dim=32)
    tokens = prompt(40)[None]
    rows, _ = teacher_forced(model, params, tokens, 32, None)
    more, _ = teacher_forced(model, params, tokens, 32, None, first=True)
    before, _ = teacher_forced(model, params, tokens, 31, None)
    np.testing.assert_array_equal(more[:, 1:], rows)
    np.testing.assert_allclose(more[:, 0], before[:, 0], atol=1e-4)
    assert not np.allclose(more[:, 0], rows[:, 0], atol=1e-2)
    found = quality(more, more, np.zeros((1, 9), int))
    assert found.kl.max() == 0 and found.top1.min() == 1
