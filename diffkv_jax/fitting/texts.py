"""The tokens that candidates are measured on: text that goes on, and text that is repeated."""

from typing import NamedTuple

import numpy as np

GOES_ON, REPEATS = 32, 32  # tokens fed of each kind
STEPS = GOES_ON + REPEATS
LEAST = 192  # tokens of context below which the recent window would be most of it
LEARNED = 4  # tokens of a repeated passage that nobody can foresee


class Texts(NamedTuple):
    """Rows int32 [S, context + STEPS + 1]: `context` tokens and GOES_ON more of a text, then
    REPEATS tokens of its context once again, which shows whether it can still be read there.
    """

    rows: np.ndarray
    context: int

    @property
    def fed(self) -> np.ndarray:
        return self.rows[:, :-1]

    @property
    def next_tokens(self) -> np.ndarray:
        return self.rows[:, self.context + 1 :]


def split(tokens: np.ndarray, context: int, fitted: int) -> tuple[Texts, Texts]:
    """Texts to fit on, `fitted` rows at most half of all, and the rest of `tokens` int32 [S, N],
    cut into rows of `context`.

    Raises:
        ValueError: there are no two rows.
    """
    width = context + GOES_ON + 1
    rows = [row[i : i + width] for row in tokens for i in range(0, len(row) - width + 1, width)]
    if len(rows) < 2:
        raise ValueError(
            f"tokens of shape {list(tokens.shape)} make {len(rows)} rows of {width}, and two are "
            "needed, one to fit on and one to report on: give more text or a smaller context"
        )
    made = np.stack([_with_repeat(row, context, i, len(rows)) for i, row in enumerate(rows)])
    fitted = min(fitted, len(rows) // 2)
    # spread over the text, which may change from language to language
    chosen = np.linspace(0, len(rows) - 1, fitted, endpoint=False).astype(int)
    others = np.setdiff1d(np.arange(len(rows)), chosen)
    return Texts(made[chosen], context), Texts(made[others], context)


def _with_repeat(row: np.ndarray, context: int, number: int, rows: int) -> np.ndarray:
    """The row and REPEATS tokens of its context, from another depth in each row."""
    depth = (2 * number + 1) * (context - 2 * REPEATS) // (2 * rows)
    return np.concatenate([row, row[depth : depth + REPEATS]]).astype(np.int32)


def joined(texts: Texts, context: int) -> Texts:
    """Rows of as many whole contexts one behind the other as `context` tokens hold: each begins
    with another, goes on as the last does, and repeats a passage of its first.
    """
    count = min(max(context // texts.context, 1), len(texts.rows))
    if count == 1:
        return texts
    contexts, rows = texts.rows[:, : texts.context], []
    for i in range(len(texts.rows)):
        places = [(i + j) % len(texts.rows) for j in range(count)]
        last = texts.rows[places[-1], : texts.context + GOES_ON + 1]
        row = np.concatenate([*contexts[places[:-1]], last])
        rows.append(_with_repeat(row, texts.context, i, len(texts.rows)))
    return Texts(np.stack(rows), count * texts.context)
