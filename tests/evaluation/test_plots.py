"""Plots, where matplotlib is installed; what they are made of, everywhere."""

from types import SimpleNamespace

import numpy as np
import pytest

from diffkv_jax.evaluation import OnTexts, Quality, TaskResult
from diffkv_jax.evaluation.plots import draw, pareto
from diffkv_jax.evaluation.run import Results


def on_texts(kl: float) -> OnTexts:
    steps = np.full((1, 64), kl)
    report = SimpleNamespace(
        tier_names=("K8V4",),
        allocated=30,
        bf16=100,
        allocated_bytes=np.full((2, 1, 3, 2), 2),
        bf16_bytes=np.array([100]),
        tokens=np.arange(12).reshape(2, 1, 3, 2),
        dropped=np.ones((2, 1, 3), int),
    )
    return OnTexts("p", Quality(steps, steps, steps, steps), report)


def test_bytes_and_kept_tokens():
    one = on_texts(0.1)
    assert one.of_bf16.tolist() == [0.3]
    assert list(one.kept) == ["K8V4", "recent", "held"]
    assert one.kept["held"].shape == (2, 3)
    last = [share[1, 2] for share in one.kept.values()]
    assert last == pytest.approx([10 / 22, 11 / 22, 21 / 22])


def test_pareto():
    assert pareto([(3, 1), (1, 2), (2, 3), (2, 1.5)]) == [(1, 2), (2, 1.5), (3, 1)]


def test_files(tmp_path):
    pytest.importorskip("matplotlib")
    details = tuple({"depth": d, "length": n} for n in (256, 512) for d in (0.25, 0.75))
    scores = np.array([1.0, 0, 1, 1])
    needle = TaskResult("needle", "p", scores, ("",) * 4, ("",) * 4, details, 0.3)
    both = {"diffkv(1, 0)": on_texts(0.1), "none": on_texts(0.0)}
    found = Results(("a.txt",), both, {"needle": needle}, {"diffkv(1, 0)": {"needle": needle}})
    names = ["pareto", "kept_diffkv_1_0", "kept_none", "needle_full_cache", "needle_diffkv_1_0"]
    paths = draw(tmp_path, found)
    assert [path.name for path in paths] == [f"{name}.svg" for name in names]
    assert all(b"<svg" in path.read_bytes()[:600] for path in paths)


def test_nothing_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    assert draw(tmp_path, Results()) == [] and not list(tmp_path.iterdir())
