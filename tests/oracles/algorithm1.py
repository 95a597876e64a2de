"""A slow model of the decisions of DiffKV for one head of one layer of one request (docs/design.md,
section 1).

Explicit Python lists of tokens and one token at a time; no keys or values, only who is in which
tier. "Algorithm 1" in the comments is that of the paper, arXiv 2412.03131, section 4; section
numbers are those of docs/design.md.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Token:
    """One token of the head: its position in the sequence and its summed significance S (a scalar
    of the model's dtype).
    """

    position: int
    significance: Any


class Head:
    """Decisions for one head. `tiers` maps every position seen so far to 'recent', 'high', 'low' or
    'dropped'.
    """

    def __init__(self, alpha_high, alpha_low, window=64, flush=1, observe=64, dtype=np.float32):
        self.alpha_high, self.alpha_low = alpha_high, alpha_low
        self.window, self.flush, self.observe, self.dtype = window, flush, observe, dtype
        self.recent, self.high, self.low, self.gone = [], [], [], []
        self.seen = 0  # P: tokens seen so far
        self.observed = 0  # queries that have scored so far
        self.steps = 0  # decode steps since the prompt
        self.log = []  # (P, position, tier before, tier after) of every change

    @property
    def tiers(self):
        lists = {"recent": self.recent, "high": self.high, "low": self.low, "dropped": self.gone}
        return dict(
            sorted((token.position, tier) for tier, tokens in lists.items() for token in tokens)
        )

    @property
    def held(self):
        return sorted(token.position for token in self.recent + self.high + self.low)

    def mean(self, token):
        """m = S / n with n = min(P - t, observed): every query scored the token, except those that
        came before it.
        """
        return self.dtype(token.significance) / self.dtype(
            min(self.seen - token.position, self.observed)
        )

    def wanted(self, token):
        """The tier of a token by the thresholds alone; both comparisons are strict."""
        mean = self.mean(token)
        if mean < self.dtype(self.alpha_low) / self.dtype(self.seen):
            return "dropped"
        if mean < self.dtype(self.alpha_high) / self.dtype(self.seen):
            return "low"
        return "high"

    def prefill(self, column_sums, num_tokens):
        """The whole prompt: column_sums[t] is S_t, already summed over the observing rows and
        maximised over the query heads.
        """
        self.seen = num_tokens
        self.observed = num_tokens if self.observe == "all" else min(self.observe, num_tokens)
        self.recent = [
            Token(position, self.dtype(column_sums[position])) for position in range(num_tokens)
        ]
        # Section 1, "Event after a prompt" (paper, section 4, prompt phase): tokens outside the
        # window are classified.
        for token in self.leaving():
            self.move(token, self.recent, self.wanted(token))
        return self.tiers

    def step(self, probabilities):
        """One decode step; probabilities[t] is max_j p_j[t] for every token the head holds and for
        the new one, at position P.
        """
        self.recent.append(Token(self.seen, self.dtype(0)))
        self.seen += 1
        self.observed += 1
        self.steps += 1
        assert sorted(probabilities) == self.held
        for token in self.recent + self.high + self.low:
            token.significance = self.dtype(
                token.significance + self.dtype(probabilities[token.position])
            )
        if self.flush == 1:
            self.one_token_leaves()
        elif self.steps % self.flush == 0:
            self.all_victims()
        return self.tiers

    def leaving(self):
        return [token for token in self.recent if token.position < self.seen - self.window]

    def move(self, token, source, tier):
        name = {id(self.recent): "recent", id(self.high): "high", id(self.low): "low"}[id(source)]
        source[:] = [other for other in source if other is not token]
        {"high": self.high, "low": self.low, "dropped": self.gone}[tier].append(token)
        self.log.append((self.seen, token.position, name, tier))

    def least_significant(self, tokens):
        return min(tokens, key=lambda token: (self.mean(token), token.position))  # ties: the older

    def one_token_leaves(self):
        """Algorithm 1, generation phase: t_c is the token that leaves the window, t_v the
        victim.
        """
        leaving = self.leaving()
        if not leaving:
            return  # the sequence is still no longer than the window
        (candidate,) = leaving
        tier = self.wanted(candidate)
        self.move(candidate, self.recent, tier)
        if tier == "high":
            # Algorithm 1: sig(t_c) reaches alpha_h/N, t_c joins KV_h; the least significant token
            # t_v of KV_h is re-examined.
            victim = self.least_significant(self.high)
            again = self.wanted(victim)
            if again != "high":
                # Algorithm 1: t_v between the thresholds is requantised into KV_l; below alpha_l/N
                # it is pruned.
                self.move(victim, self.high, again)
            # Algorithm 1: otherwise t_v stays.
        elif tier == "low":
            # Algorithm 1: sig(t_c) between the thresholds, t_c joins KV_l; the least of KV_l is
            # pruned when below alpha_l/N.
            victim = self.least_significant(self.low)
            if self.wanted(victim) == "dropped":
                self.move(victim, self.low, "dropped")
        # Algorithm 1: sig(t_c) below alpha_l/N, t_c is pruned and nothing else happens.

    def all_victims(self):
        """Section 1, "Event in decode", flush > 1: Algorithm 1 with every victim at once instead of
        one.
        """
        stored_high, stored_low = list(self.high), list(self.low)
        for token in self.leaving():
            self.move(token, self.recent, self.wanted(token))
        for token in stored_high:
            if self.wanted(token) != "high":
                # below tau_low dropped, below tau_high demoted
                self.move(token, self.high, self.wanted(token))
        for token in stored_low:
            if self.wanted(token) == "dropped":
                self.move(token, self.low, "dropped")  # never promoted
