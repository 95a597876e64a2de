"""`algorithm1.Head` with a significance that forgets (docs/design.md, section 1), from its
definition: every query that saw a token has a weight for it, 1 when it comes. After an event, and
before a prompt scores, the weights of a token are scaled to add up to at most half of what the
queries until the next event leave of the horizon. Also takes further prompts.
"""

from .algorithm1 import Head, Token


class Forgetting(Head):
    """Decisions for one head; the horizon is `observe`."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.weight, self.total = {}, {}  # sums of weights, and of weighted probabilities

    def mean(self, token):
        return self.dtype(self.total[token.position] / self.weight[token.position])

    def forget(self, coming):
        most = max(self.observe - coming, 0) // 2
        for token in self.recent + self.high + self.low:
            position = token.position
            if self.weight[position] > most:
                self.total[position] *= most / self.weight[position]
                self.weight[position] = most
            token.significance = self.total[position]

    def score(self, position, probability, count=1):
        """`count` queries gave `probability` together."""
        self.weight[position] = self.weight.get(position, 0) + count
        self.total[position] = self.total.get(position, 0.0) + float(probability)

    def prefill(self, column_sums, num_tokens):
        """The first prompt or a further one, of `num_tokens`; `column_sums` of all that is held."""
        scoring = min(self.observe, num_tokens)
        self.forget(max(self.flush, scoring))
        self.recent.extend(Token(self.seen + i, self.dtype(0)) for i in range(num_tokens))
        self.seen, self.steps = self.seen + num_tokens, 0
        for token in self.recent + self.high + self.low:
            count = min(self.seen - token.position, scoring)
            self.score(token.position, column_sums[token.position], count)
        self.all_victims()
        self.forget(self.flush)
        return self.tiers

    def step(self, probabilities):
        for position, probability in probabilities.items():
            self.score(position, probability)
        super().step(probabilities)
        if self.steps % self.flush == 0:
            self.forget(self.flush)
        return self.tiers
