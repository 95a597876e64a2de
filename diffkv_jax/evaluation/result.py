"""`TaskResult`: how a policy did on the problems of a task."""

from collections.abc import Mapping, Sequence
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
        """The mean score and its standard error over problems, as if there were four more, two of
        them right.
        """
        return mean_of(self.scores)

    def against(self, full: "TaskResult") -> Estimate:
        """The mean of this score minus that of `full`, problem by problem, and its standard error,
        as if there were two more problems and one of them had other scores (Agresti and Min 2005).

        Raises:
            ValueError: they are other problems.
        """
        if (self.task, self.expected) != (full.task, full.expected):
            raise ValueError(
                f"{self.task} with {len(self.scores)} problems and {full.task} with "
                f"{len(full.scores)} must be the same problems: run both with the same arguments"
            )
        return mean_of(self.scores - full.scores, (0.5**0.5, -(0.5**0.5)))


def mean_of(scores: np.ndarray, added: Sequence[float] = (0, 0, 1, 1)) -> Estimate:
    """The mean of `scores` [n] and its standard error, for which `added` ones are put to them: a
    few problems that all agree are no certainty (Agresti and Coull 1998).
    """
    some = np.concatenate([scores, added])
    return Estimate(float(scores.mean()), float(some.std() / len(some) ** 0.5))
