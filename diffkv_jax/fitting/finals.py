"""The best paths once more, behind texts as long as the context: what narrow keys cost grows with
the tokens that a query looks through.
"""

from collections.abc import Callable, Sequence

from diffkv_jax.fitting.goal import Goal
from diffkv_jax.fitting.measure import Bench, Measured
from diffkv_jax.fitting.search import Tried
from diffkv_jax.fitting.texts import joined

ROWS, PATHS = 2, 3


def decided(
    bench: Bench,
    goal: Goal,
    tried: Sequence[Tried],
    measure: Callable[[Bench, Tried], Measured],
) -> Tried:
    """The best of `tried`, which come best first; of a share of bytes, the one that costs least at
    the context. `measure` runs it on another bench.
    """
    texts = joined(bench.texts, bench.context)
    if goal.share is None or texts.context == bench.texts.context:
        return tried[0]
    met = [one for one in tried if goal.met(one.measured)]
    best_of = {one.path: one for one in reversed(met)}  # of each path, the best
    finalists = sorted(best_of.values(), key=met.index)[:PATHS]
    if len(finalists) < 2:
        return tried[0]
    longer = bench.with_texts(texts._replace(rows=texts.rows[:ROWS]))
    found = [one._replace(measured=measure(longer, one)) for one in finalists]
    best = min(found, key=lambda one: goal.order(one.measured))
    return best if goal.met(best.measured) else tried[0]
