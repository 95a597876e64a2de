"""`quality`: next-token distributions of a compressed run against the full one, with errors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from diffkv_jax.arguments import integer, one_of

BLOCK = 16  # neighbouring positions that are drawn together: their errors depend on each other
DRAWS = 300  # of the bootstrap: its own error is 4 % of the standard error


class Estimate(NamedTuple):
    """A figure and its standard error, NaN where there is too little to tell."""

    value: float
    error: float

    def __format__(self, spec: str) -> str:
        """The value and, where it is known, the error, both by `spec`."""
        error = "" if np.isnan(self.error) else f" ± {format(self.error, spec.lstrip('+'))}"
        return f"{format(self.value, spec)}{error}"


@dataclass(frozen=True)
class Summary:
    """What one run costs, over all its texts.

    Attributes:
        mean_kl, p99_kl: of the divergence at each position, nats.
        top1: share of positions at which both caches rank the same token first.
        perplexity_full, perplexity: of what the text goes on with.
        over: what the standard errors are over: "positions" or "texts".
    """

    mean_kl: Estimate
    p99_kl: Estimate
    top1: Estimate
    perplexity_full: Estimate
    perplexity: Estimate
    over: str


@dataclass(frozen=True)
class Quality:
    """A compressed run against the full one on the same tokens; arrays are float64 [R, steps].

    Attributes:
        kl: Kullback-Leibler divergence of the compressed next-token distribution from the full one,
            nats.
        top1: 1 where both rank the same token first.
        nll_full, nll: negative log-likelihood of the text's next token, nats.
    """

    kl: np.ndarray
    top1: np.ndarray
    nll_full: np.ndarray
    nll: np.ndarray

    @property
    def perplexity_full(self) -> np.ndarray:
        """Perplexity with the full cache, float64 [R]."""
        return np.exp(self.nll_full.mean(axis=1))

    @property
    def perplexity(self) -> np.ndarray:
        """Perplexity with the compressed cache, float64 [R]."""
        return np.exp(self.nll.mean(axis=1))

    def text(self, row: int) -> "Quality":
        """The run on one text: arrays [1, steps].

        Raises:
            ValueError: there is no such row.
        """
        row = integer("row", row, least=0, most=len(self.kl) - 1)
        return Quality(*(x[row : row + 1] for x in (self.kl, self.top1, self.nll_full, self.nll)))

    def summary(
        self, over: Literal["positions", "texts"] = "positions", *, block: int = BLOCK
    ) -> Summary:
        """The figures with standard errors, from bootstrap draws with a fixed seed.

        Over "positions" draws blocks of `block` neighbouring ones of all texts: how sure the
        figures are for these texts. Over "texts" draws whole texts: how sure they are for others
        like them.

        Raises:
            ValueError: it is neither, or `block` is below one.
        """
        over = one_of("over", over, ("positions", "texts"))
        size = integer("block", block, least=1) if over == "positions" else self.kl.shape[1]

        def figure(values: np.ndarray, of: Callable[..., np.ndarray]) -> Estimate:
            return _estimate(values, of, size)

        return Summary(
            mean_kl=figure(self.kl, np.mean),
            p99_kl=figure(self.kl, _p99),
            top1=figure(self.top1, np.mean),
            perplexity_full=figure(self.nll_full, _perplexity),
            perplexity=figure(self.nll, _perplexity),
            over=over,
        )


def _p99(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.quantile(values, 0.99, axis=axis)


def _perplexity(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.exp(values.mean(axis=axis))


def _estimate(values: np.ndarray, of: Callable[..., np.ndarray], size: int) -> Estimate:
    """`of` all of `values` [R, steps], and its spread over draws of as many blocks of `size`; what
    is left of a row belongs to its last block.
    """
    edges = list(range(0, max(values.shape[1] - size, 0) + 1, size))[1:]
    blocks = [part for row in values for part in np.split(row, edges)]
    if len(blocks) < 2:
        return Estimate(float(of(values)), float("nan"))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(blocks), (DRAWS, len(blocks)))
    found = [of(np.concatenate([blocks[i] for i in draw])) for draw in drawn]
    few = len(blocks) / (len(blocks) - 1)  # draws of n vary by (n - 1) / n of what n blocks say
    return Estimate(float(of(values)), float(np.sqrt(few) * np.std(found, ddof=1)))


def quality(
    full: np.ndarray, compressed: np.ndarray, next_tokens: Sequence[Sequence[int]] | np.ndarray
) -> Quality:
    """Compare log-probabilities [R, steps, vocab] of two runs; `next_tokens` int [R, steps] is what
    the text goes on with.
    """
    p = full.astype(np.float64)
    q = compressed.astype(np.float64)
    index = np.asarray(next_tokens)[..., None]
    return Quality(
        kl=(np.exp(p) * (p - q)).sum(axis=-1),
        top1=(p.argmax(axis=-1) == q.argmax(axis=-1)).astype(np.float64),
        nll_full=-np.take_along_axis(p, index, axis=-1)[..., 0],
        nll=-np.take_along_axis(q, index, axis=-1)[..., 0],
    )
