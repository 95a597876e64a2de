"""One model behind some texts, and what policies cost on them."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

import diffkv_jax as dkv
from diffkv_jax.calibration.usual import with_usual
from diffkv_jax.fitting.measure import Bench, Measured
from diffkv_jax.fitting.texts import STEPS, Texts
from diffkv_jax.testing.texts import TEXTS, load_text

PLACES = (0, 40_000)  # characters from which rows of each text begin


@dataclass(frozen=True)
class Row:
    """One policy: mean KL, its standard error over the texts' rows, and the bytes of bfloat16."""

    name: str
    kl: float
    error: float
    share: float
    kept: tuple[float, ...]  # share of the tokens in each tier, and last in the recent window

    @property
    def cells(self) -> str:
        kept = " / ".join(f"{share:.2f}" for share in self.kept)
        return f"{self.kl:.4f} ± {self.error:.4f} | {self.share:.3f} | {kept}"


class Setting:
    """Two rows of each of the three texts: `context` tokens, and 64 more that are fed."""

    def __init__(self, model: Any, params: Any, tokenizer: Any, context: int):
        self.model, self.params, self.tokenizer = model, params, tokenizer
        rows = [
            tokenizer(load_text(name)[at : at + 16 * context]).input_ids[: context + STEPS + 1]
            for name in TEXTS
            for at in PLACES
        ]
        self.texts = Texts(np.array(rows, np.int32), context)
        self.bench = Bench(model, params, self.texts, context, replays=True)

    def measured(self, policy: dkv.CompressionPolicy, learned: Any = None) -> Measured:
        """`learned` is the calibration, where it is not that of the built-in text."""
        policy = with_usual(policy, self.model.attention)
        if learned is None and policy.transform.learned:
            learned = self._built_in
        if learned is not None:
            count = len(policy.tiers)
            learned = replace(learned, tiers=policy.tiers, tables=((None, None),) * count)
        return self.bench.of(policy, learned)

    def row(self, name: str, policy: dkv.CompressionPolicy, learned: Any = None) -> Row:
        """One line of a table."""
        found = self.measured(policy, learned)
        means = found.kl.mean(axis=1)
        error = float(means.std(ddof=1) / np.sqrt(len(means)))
        return Row(name, float(means.mean()), error, found.share, tuple(found.kept))

    @cached_property
    def _built_in(self) -> dkv.Calibration:
        return dkv.calibrate(self.model, self.params, policy=dkv.quantized("K4V4"), progress=False)
