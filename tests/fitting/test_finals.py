"""The best paths once more behind longer texts; stand-ins for what is measured."""

from dataclasses import dataclass

import numpy as np

from diffkv_jax.fitting.candidates import Path
from diffkv_jax.fitting.finals import PATHS, ROWS, decided
from diffkv_jax.fitting.goal import Goal
from diffkv_jax.fitting.measure import Measured
from diffkv_jax.fitting.search import Tried
from diffkv_jax.fitting.texts import STEPS, Texts

TEXTS = Texts(np.zeros((4, 200 + STEPS + 1), np.int32), 200)
NAMES = [Path("nothing", (name,)) for name in ("K8V8", "K8V4", "K4V4", "K4V2")]


@dataclass
class Stand:
    """A bench that has texts only."""

    texts: Texts = TEXTS
    context: int = 400

    def with_texts(self, texts: Texts) -> "Stand":
        return Stand(texts)


def cost(kl: float, share: float = 0.3) -> Measured:
    return Measured(np.full((1, 64), kl), np.ones((1, 64)), 1.0, 1.0, share, np.ones((1, 1, 1, 2)))


def run(goal: Goal, again: dict[Path, Measured], bench: Stand | None = None):
    """The decision, and which paths were measured once more."""
    tried = [Tried(path, 0.5, cost(0.01 + 0.01 * i)) for i, path in enumerate(NAMES)]
    tried.insert(1, tried[0]._replace(point=0.6))  # another place of the best path
    tried.append(Tried(NAMES[3], 0.1, cost(0.001, share=0.9)))
    asked = []

    def measure(on: Stand, one: Tried) -> Measured:
        assert on.texts.context == 400 and len(on.texts.rows) == ROWS
        asked.append(one.path)
        return again[one.path]

    return decided(bench or Stand(), goal, tried, measure), asked  # pyright: ignore


def test_what_costs_least_at_the_context_is_taken():
    again = {NAMES[0]: cost(0.04), NAMES[1]: cost(0.02), NAMES[2]: cost(0.03)}
    best, asked = run(Goal(0.35, None), again)
    assert asked == NAMES[:PATHS]
    assert best.path == NAMES[1] and best.measured.mean_kl == again[NAMES[1]].mean_kl


def test_what_takes_too_many_bytes_there_is_not():
    again = {path: cost(0.04, share=0.5) for path in NAMES}
    again[NAMES[2]] = cost(0.05, share=0.34)
    assert run(Goal(0.35, None), again)[0].path == NAMES[2]
    again[NAMES[2]] = cost(0.05, share=0.36)
    best, _ = run(Goal(0.35, None), again)
    assert best.path == NAMES[0] and best.measured.mean_kl == cost(0.01).mean_kl


def test_nothing_is_measured_again_where_it_would_be_the_same():
    assert run(Goal(0.35, None), {}, Stand(context=399))[1] == []
    assert run(Goal(None, 0.05), {})[1] == []
