"""How many pages requests will take: plain Python over numbers of pages and tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from diffkv_jax.cache.pool_size import most_pages
from diffkv_jax.cache.spec import CacheSpec

WEIGHT = 0.1  # of a new observation in a running mean


class Load(NamedTuple):
    """What a request holds, and is expected to take until it ends."""

    pages: float
    rate: float  # pages a token
    left: float  # tokens to come


def peak(loads: Iterable[Load]) -> float:
    """Most pages that requests hold at once, each growing a step at a time until it ends (the
    estimate of LightLLM's past-future scheduler, arXiv:2507.10150).
    """
    pages = rate = most = 0.0
    for load in sorted(loads, key=lambda load: -load.left):
        pages, rate = pages + load.pages, rate + load.rate
        most = max(most, pages + rate * load.left)
    return most


@dataclass
class Estimate:
    """How many pages requests of this engine come to take, as running means of what they took."""

    spec: CacheSpec
    rate: float = 0.0  # pages a stored token, over all layers and heads
    used: float = 1.0  # share of `max_new_tokens` that a request generates

    def __post_init__(self) -> None:
        layout = self.spec.layout
        # until something is seen: all in the highest tier
        self.rate = self._heads / layout.tokens_per_page(0)

    @property
    def _heads(self) -> int:
        return self.spec.unmerged_layers * self.spec.attention.num_kv_heads

    @property
    def _part_filled(self) -> float:
        """Pages more than full ones: on average half a page of a tier."""
        return self._heads * self.spec.layout.tiers / 2

    def pages(self, tokens: int) -> float:
        """What a request of so many tokens holds."""
        stored = max(tokens - self.spec.window, 0)
        return self._part_filled + self.rate * stored if stored else 0.0

    def chunk_pages(self, before: int, tokens: int) -> int:
        """Most pages that a chunk of so many tokens behind `before` takes, before anything is
        dropped.
        """
        spec, window = self.spec, self.spec.window
        leaving = max(before + tokens - window, 0) - max(before - window, 0)
        if not leaving or not spec.paged_layers:
            return 0
        waiting = spec.layout.tokens_per_group - 1  # outside of whole blocks until now
        return most_pages(spec, [leaving + waiting + window]) + self._heads

    def event_pages(self) -> int:
        """Most pages that one event takes."""
        return self.chunk_pages(self.spec.window, self.spec.flush)

    def to_come(self, generated: int, most: int) -> float:
        """Tokens that a request will still generate."""
        return max(min(self.used * most, most) - generated, 1.0)

    def saw(self, tokens: int, pages: int) -> None:
        """A request holds so many pages."""
        stored = tokens - self.spec.window - self.spec.flush
        if stored >= self.spec.window:
            rate = max(pages - self._part_filled, 0) / stored
            self.rate += WEIGHT * (rate - self.rate)

    def ended(self, generated: int, most: int) -> None:
        """A request has ended by itself after so many tokens of `most`."""
        self.used += WEIGHT * (generated / max(most, 1) - self.used)
