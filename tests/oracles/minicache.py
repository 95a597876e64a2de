"""NumPy reference of MiniCache (arXiv:2405.14366, section 4 of the paper): what the layers of one
request hold, and attention over it.

Written from the equations alone; it shares no code with the library.
"""

import numpy as np

from diffkv_jax.testing.stored_numbers import read_scale, stored_scale


def unit(x):
    """`x [..., d]` over its length; zero stays zero."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def angles(x, y):
    """Angle between `x` and `y [..., d]`."""
    return np.arccos(np.clip((unit(x) * unit(y)).sum(-1), -1, 1))


def common_direction(x, y, t):
    """SLERP from the direction of `x` to that of `y [..., d]`, at unit length; a line where the arc
    is not unique.
    """
    omega = angles(x, y)[..., None]
    arc = np.sin(omega) > 1e-3
    sine = np.where(arc, np.sin(omega), 1)
    to_x = np.where(arc, np.sin((1 - t) * omega) / sine, 1 - t)
    to_y = np.where(arc, np.sin(t * omega) / sine, t)
    return unit(to_x * unit(x) + to_y * unit(y))


def merged(x, y, t):
    """Both layers' vectors as restored from one direction and two norms, which are kept in 16
    bits.
    """
    direction = common_direction(x, y, t)
    norms = (
        read_scale(stored_scale(np.linalg.norm(z, axis=-1, keepdims=True))).astype(x.dtype)
        for z in (x, y)
    )
    return tuple(norm * direction for norm in norms)


class Request:
    """Layers from `first` on are merged in pairs. `retain` picks, from the angles, how the tokens
    that stay unmerged are ranked.
    """

    def __init__(
        self,
        layers,
        heads,
        dim,
        first,
        t=0.6,
        retention=0.05,
        swap_norms=False,
        retain=lambda angle: angle,
    ):
        self.first, self.t, self.retention, self.swap_norms, self.retain = (
            first,
            t,
            retention,
            swap_norms,
            retain,
        )
        self.held = np.zeros((2, layers, 0, heads, dim))  # K and V as attention reads them
        self.exact = self.held.copy()
        self.shared = np.zeros((layers, 0, heads), bool)
        self.stored = 0  # tokens that have left the recent window

    @property
    def seen(self):
        """Tokens so far."""
        return self.held.shape[2]

    def append(self, k, v):
        """New exact tokens `[L, n, K, d]`."""
        new = np.stack([k, v]).astype(float)
        self.held, self.exact = (
            np.concatenate([old, new], axis=2) for old in (self.held, self.exact)
        )
        self.shared = np.concatenate([self.shared, np.zeros(new.shape[1:4], bool)], axis=1)

    def leave(self, window):
        """All but the last `window` tokens leave the window, and merge."""
        at = np.arange(self.stored, max(self.seen - window, self.stored))
        self.stored += len(at)
        for pair in range(self.first, self.held.shape[1], 2):
            for head in range(self.held.shape[3]):
                self._merge(pair, head, at)

    def _merge(self, pair, head, at):
        x, y = (self.exact[:, layer, at, head] for layer in (pair, pair + 1))  # [2, n, d]
        retained = int((~self.shared[pair, : self.stored - len(at), head]).sum())
        more = int(np.ceil(round(self.retention * self.stored, 6))) - retained
        order = np.argsort(-self.retain(angles(x, y).sum(axis=0)), kind="stable")
        merges = np.sort(order[more:])
        first, second = merged(x[:, merges], y[:, merges], self.t)
        if self.swap_norms:
            first, second = second, first
        self.held[:, pair, at[merges], head], self.held[:, pair + 1, at[merges], head] = (
            first,
            second,
        )
        self.shared[pair : pair + 2, at[merges], head] = True

    def attend(self, q):
        """Outputs `[L, n, H, d]` of the last n queries `[L, n, H, d]`, causal."""
        n, group = q.shape[1], q.shape[2] // self.held.shape[3]
        k, v = np.repeat(self.held, group, axis=3)
        logits = np.einsum("lnhd,lmhd->lhnm", q, k) / np.sqrt(q.shape[3])
        position = np.arange(self.seen)
        logits = np.where(position <= self.seen - n + np.arange(n)[:, None], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return np.einsum("lhnm,lmhd->lnhd", weights / weights.sum(-1, keepdims=True), v)
