"""What `fit_policy` chooses from: a transform, and paths from many bytes to few, each of one tier,
or of two and what ranks tokens.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.methods.diffkv import diffkv
from diffkv_jax.methods.evicting import evicting
from diffkv_jax.methods.kvzip import ContextReconstruction
from diffkv_jax.methods.quantized import quantized
from diffkv_jax.model import AttentionSpec
from diffkv_jax.policy.affine import Centered, Chain, even_channels
from diffkv_jax.policy.keep import Budget
from diffkv_jax.policy.learned import Learned
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.transform import EXACT, Hadamard, Transform

SINKS = 4
COARSE = (0.1, 0.5, 0.9)  # places on a path that are measured first
WINDOW, SHORT_WINDOW = 64, 32  # exact tokens; half as many leave at once
SHORT = 2048  # tokens of context below which those of `WINDOW` would be much of it
OTHERS = 4.0  # alpha_high of heads that are not in the first tier as a whole

Head = tuple[int, int]  # numbers of a layer without a sliding window, and of its KV head


class Path(NamedTuple):
    """Policies from 0 (most bytes) to 1 (fewest).

    Attributes:
        ranks: "nothing": all tokens are in one tier, in every place; "attention": DiffKV's, nothing
            is dropped, the first tier shrinks; "heads": likewise, and heads from the beginning of
            `order` are in it as a whole, fewer and fewer; "dropping": DiffKV's too, tokens go as
            they come, so that a pool need never hold them all; "repeating": KVzip's, which reads
            the whole prompt a second time before tokens go.
        tiers: a precise one for tokens of high rank, a narrow one for the others.
        high: share of the tokens that stay which "repeating" puts into the first.
        window: tokens that stay exact.
        order: all heads, those that need the first tier most before the others (`neediest`).
        shape: how many layers without a sliding window and KV heads there are.
    """

    ranks: Literal["nothing", "attention", "heads", "dropping", "repeating"]
    tiers: tuple[str, ...]
    high: float = 0.0
    window: int = WINDOW
    order: tuple[Head, ...] = ()
    shape: Head = (0, 0)

    @property
    def coarse(self) -> tuple[float, ...]:
        """Places that are measured first."""
        return COARSE[1:2] if self.ranks == "nothing" else COARSE

    def policy(
        self, transform: Transform, points: Sequence[float], rows: int = 1
    ) -> CompressionPolicy:
        """The policy whose requests stand at `points`, `rows` of them at each; with one point it is
        for any batch.
        """

        def amounts(values: list[float]) -> Any:
            if len(values) == 1:
                return values[0]
            return (tuple((value,) for value in values for _ in range(rows)),)  # [1, R, 1]

        options = self._options(transform)
        if self.ranks == "nothing":
            recent: Any = {name: options[name] for name in ("window", "flush", "transform")}
            return quantized(*self.tiers, **recent)
        if self.ranks == "heads":
            counts = [round(len(self.order) * (1 - point) ** 2) for point in points]
            return self.raising(transform, [self.order[:count] for count in counts], rows)
        if self.ranks == "attention":
            return diffkv(amounts([0.25 * 64**point for point in points]), 0.0, **options)
        if self.ranks == "dropping":
            return diffkv(4.0, amounts([0.001 * 300**point for point in points]), **options)
        keep = [0.9 * 0.25**point for point in points]
        high = amounts([share * self.high for share in keep])
        budget = Budget(keep=amounts(keep), keep_high=high, share_heads=0.0, share_layers=True)
        return evicting("kvzip", ContextReconstruction(), budget, **options)

    def raising(
        self, transform: Transform, sets: Sequence[Sequence[Head]], rows: int
    ) -> CompressionPolicy:
        """The policy whose requests have these heads in the first tier, `rows` of them each set;
        with one set it is for any batch.
        """
        layers, heads = self.shape
        alphas = np.full((layers, len(sets), heads), OTHERS)
        for i, one in enumerate(sets):
            for layer, head in one:
                alphas[layer, i, head] = 0.0
        alphas = alphas if len(sets) == 1 else alphas.repeat(rows, axis=1)  # [L, R, K]
        alpha_high: Any = alphas.tolist()
        return diffkv(alpha_high, 0.0, **self._options(transform))

    def _options(self, transform: Transform) -> Any:
        options = {"tiers": self.tiers, "transform": transform, "sinks": SINKS}
        return options | {"window": self.window, "flush": self.window // 2}


KEEPING = (
    *(Path("nothing", (tier,)) for tier in ("K8V8", "K8V4", "K4nV4n", "K4nV2n")),
    Path("attention", ("K8V8", "K4nV4n")),
    Path("attention", ("K8V8", "K4nV2n")),
    Path("attention", ("K8V4", "K4nV2n")),
)
BY_HEADS = (
    Path("heads", ("K8V8", "K4nV2n")),
    Path("heads", ("K8V4", "K4nV2n")),
    Path("heads", ("K4nV4n", "K4nV2n")),
)
NARROW = (Path("heads", ("K8V4", "K2nV2n")), Path("heads", ("K4nV4n", "K2nV2n")))
DROPPING = (
    Path("repeating", ("K8V8", "K4nV4n"), 0.08),
    Path("repeating", ("K8V8", "K4nV2n"), 0.08),
)
IN_A_POOL = (Path("dropping", ("K8V4", "K4nV2n")),)
ROUGH = Path("attention", ("K8V4", "K2nV2n"))  # where a transform matters most


def possible(paths: Sequence[Path], attention: AttentionSpec, context: int) -> list[Path]:
    """Those that the model can have, for requests of `context` tokens."""
    window = SHORT_WINDOW if context < SHORT else WINDOW
    layers = sum(one is None for one in attention.sliding_windows)
    shape = layers, attention.num_kv_heads
    given = [path._replace(window=window, shape=shape) for path in paths]
    return [path for path in given if fits(path.policy(EXACT, (1.0,)), attention)]


def transforms(attention: AttentionSpec) -> list[Transform]:
    """Those that the model can have, the one that helps most models first."""
    centered = Chain((Centered(), Learned())), even_channels(), Chain((Centered(), Hadamard()))
    choices: list[Transform] = [*centered, Learned(), Hadamard()]
    found = [one for one in choices if fits(KEEPING[0].policy(one, (1.0,)), attention)]
    return found[:3] or [EXACT]


def fits(policy: CompressionPolicy, attention: AttentionSpec) -> bool:
    """Whether a model can have a policy."""
    size: Any = {"num_requests": 1, "max_len": 256, "num_pages": 0, "dtype": attention.dtype}
    try:
        CacheSpec.build(attention, policy, **size)
    except ValueError:
        return False
    return True
