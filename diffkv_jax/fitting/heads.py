"""Which KV heads need a precise tier most: what the mean KL falls by where one alone has it."""

from collections.abc import Callable, Sequence

from diffkv_jax.calibration.calibration import Calibration
from diffkv_jax.fitting.candidates import Head, Path
from diffkv_jax.fitting.measure import Bench
from diffkv_jax.policy.transform import Transform

COPIES = 6  # sets of heads in a batch
MUCH = 0.03  # of the mean KL: a layer that gains so much is looked at head by head


def neediest(
    bench: Bench,
    path: Path,
    transform: Transform,
    calibration: Calibration | None,
    seen: Callable[[], object],
) -> tuple[Head, ...]:
    """All heads of `path`, by what each gains; `seen` is called after each batch. Heads of a layer
    that gains little are taken together, in its mean.
    """
    layers, heads = path.shape
    whole = [tuple((layer, head) for head in range(heads)) for layer in range(layers)]

    def costs(sets: Sequence[Sequence[Head]]) -> list[float]:
        """The mean KL with each set of heads in the first tier."""
        found = []
        for first in range(0, len(sets), COPIES):
            part = list(sets[first : first + COPIES])
            part += [()] * (COPIES - len(part))  # one program
            policy = path.raising(transform, part, len(bench.texts.rows))
            found += [one.mean_kl for one in bench.each(policy, calibration, COPIES)]
            seen()
        return found[: len(sets)]

    without, *found = costs([(), *whole])
    by_layer = [(without - cost, one) for cost, one in zip(found, whole, strict=True)]
    single = [(head,) for gain, one in by_layer if gain > MUCH * without for head in one]
    sets = [(without - cost, one) for cost, one in zip(costs(single), single, strict=True)]
    sets += [(gain / heads, one) for gain, one in by_layer if gain <= MUCH * without]
    return tuple(head for _, one in sorted(sets, key=lambda one: -one[0]) for head in one)
