"""FastGen (arXiv:2310.01801) from its equations, one head of a one-layer Llama at a time, in
NumPy.
"""

from dataclasses import dataclass, field

import numpy as np

# what each adds to the one before
POLICIES = ("special", "punctuation", "frequent", "local", "full")


def rotated(x: np.ndarray) -> np.ndarray:
    """RoPE of `[tokens, d]` at positions 0, 1, ...: channels i and i + d / 2 turn together by
    10000^(-2i / d) a position.
    """
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=1)


def queries_and_keys(
    params, tokens: np.ndarray, q_heads: int, kv_heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """`q [kv_heads, group, tokens, d]` and `k [kv_heads, tokens, d]` of the first layer of a
    Llama.
    """
    hidden = np.asarray(params["embed_tokens"]["embedding"], np.float64)[tokens]
    hidden = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + 1e-6)
    hidden = hidden * np.asarray(params["layers"]["input_layernorm"]["weight"])[0]
    q, k = (
        hidden @ np.asarray(params["layers"]["self_attn"][name]["kernel"], np.float64)[0]
        for name in ("q_proj", "k_proj")
    )
    q, k = (
        np.stack([rotated(part) for part in np.split(x, n, axis=1)])
        for x, n in ((q, q_heads), (k, kv_heads))
    )
    return q.reshape(kv_heads, q_heads // kv_heads, *q.shape[1:]), k


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf gets nothing."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@dataclass
class Head:
    """What one KV head holds. `q [group, tokens, d]`, `k [tokens, d]`, `classes [tokens]` of
    "special", "punctuation" and "".
    """

    q: np.ndarray
    k: np.ndarray
    classes: np.ndarray
    window: int
    frequent: float = 0.3
    local: float = 0.3
    sums: np.ndarray = field(init=False)
    held: set[int] = field(init=False)

    def attention(self, rows: range, held: set[int]) -> np.ndarray:
        """Mean over the group, `[rows, tokens]`: what each row gives to the tokens that are held
        and not later than itself.
        """
        logits = self.q[:, rows] @ self.k.T / np.sqrt(self.k.shape[1])
        key = np.arange(len(self.k))
        allowed = np.isin(key, list(held)) & (key <= np.array(rows)[:, None])
        return softmax(np.where(allowed, logits, -np.inf)).mean(axis=0)

    def kept_by(self, policy: int, seen: int) -> set[int]:
        """The tokens held that a policy keeps."""
        held = sorted(self.held)
        most = sorted(held, key=lambda at: -self.sums[at])[: int(self.frequent * seen)]
        sets = [
            {at for at in held if self.classes[at] == "special"},
            {at for at in held if self.classes[at] == "punctuation"},
            set(most),
            {at for at in held if at >= seen - int(self.local * seen)},
            set(held),
        ]
        return set().union(*sets[: policy + 1])

    def masses(self, prompt: int, observe: int) -> np.ndarray:
        """Reads the prompt. Share of the attention of its last `observe` queries that each policy
        keeps.
        """
        self.held = set(range(prompt))
        self.sums = self.attention(range(prompt - observe, prompt), self.held).sum(axis=0)
        return (
            np.array(
                [
                    self.sums[sorted(self.kept_by(policy, prompt))].sum()
                    for policy in range(len(POLICIES))
                ]
            )
            / observe
        )

    def drop(self, policy: int, seen: int) -> None:
        """What neither the policy nor the recent window keeps leaves."""
        self.held = self.kept_by(policy, seen) | {
            at for at in self.held if at >= seen - self.window
        }

    def step(self, at: int) -> None:
        """One decoded token's query."""
        self.held.add(at)
        self.sums = self.sums + self.attention(range(at, at + 1), self.held)[0]
