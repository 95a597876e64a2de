"""`TaskResult`: how a policy did on the problems of a task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffkv_jax.evaluation.divergence import Estimate


@dataclass(frozen=True)
class TaskResult:
    """n problems of one task.

    Attributes:
        task, policy: their names.
        scores: float64 [n], 0 (wrong) to 1 (right).
        answers: what the model wrote.
        expected: what it should have found.
        details: of each problem, such as its depth and length.
        of_bf16: allocated bytes of the caches at the end, as a share of a plain bfloat16 cache of
            the same tokens.
    """

    task: str
    policy: str
    scores: np.ndarray
    answers: tuple[str, ...]
    expected: tuple[Any, ...]
    details: tuple[Mapping[str, Any], ...]
    of_bf16: float

    @property
    def score(self) -> Estimate:
        """The mean score; its standard error is over problems."""
        return mean_of(self.scores)

    def against(self, full: "TaskResult") -> Estimate:
        """The mean of this score minus that of `full` on the same problems.

        Raises:
            ValueError: they are other problems.
        """
        if (self.task, self.expected) != (full.task, full.expected):
            raise ValueError(
                f"{self.task} with {len(self.scores)} problems and {full.task} with "
                f"{len(full.scores)} must be the same problems: run both with the same arguments"
            )
        return mean_of(self.scores - full.scores)


def mean_of(scores: np.ndarray) -> Estimate:
    """The mean of `scores` [n] and its standard error."""
    error = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else np.nan
    return Estimate(float(scores.mean()), float(error))
