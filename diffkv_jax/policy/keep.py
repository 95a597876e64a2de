"""`Keep`: which tokens stay, as thresholds on their scores; by thresholds or by budgets."""

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.arguments import flag, number, one_of, shown, tuple_of
from diffkv_jax.policy.fields import alpha, budget, from_zero
from diffkv_jax.policy.ranking import ALL, reached_by
from diffkv_jax.policy.score import PROTECTED, ScoreView
from diffkv_jax.policy.spread import SPREADS
from diffkv_jax.policy.stage import (
    Stage,
    data,
    leaf_names,
    numbers_of,
    overrides,
    static,
    with_leaves,
)

if TYPE_CHECKING:
    from diffkv_jax.policy.policy import CompressionPolicy

Alpha = float | tuple[Any, ...]
Amount = float | int | str | tuple[Any, ...]


class KeepView(NamedTuple):
    """What is decided on, of B heads."""

    scores: Array  # float32 [B, n] of all stored tokens and those that leave the window
    live: Array  # bool [B, n] where there is one
    seq_len: Array  # int32 [B] tokens seen
    exact: Array  # int32 [B] tokens that stay in the recent window
    tiers: int
    sharing: int  # how many neighbours may share: KV heads of a layer, or of all layers


class Keep(Stage):
    """Which tokens stay. The leaves of a bound one are arrays [layers, requests, kv_heads], taken
    layer by layer: [B].

    Attributes:
        ranks: whether thresholds depend on all scores, which are then gathered; else
            `KeepView.scores` has no columns.
        protects: whether `mark` itself keeps protected tokens (class 1); else they have the score
            1e30 and stay whatever it says.
        token_classes: token ids of the classes 2, 3, ... that it asks for (`cache.token_class`).
        share_layers: whether the heads of all layers share one line.
    """

    ranks: ClassVar[bool] = True
    protects: ClassVar[bool] = False
    share_layers: ClassVar[bool] = False

    @property
    def token_classes(self) -> tuple[tuple[int, ...], ...]:
        return ()

    def bind(self, shape: tuple[int, int, int]) -> "Keep":
        """Every leaf as an array of `shape`, [layers, requests, kv_heads].

        Raises:
            ValueError: one does not broadcast to it.
        """

        def bound(name: str) -> Any:
            leaf = getattr(self, name)
            if leaf is None or isinstance(leaf, Keep):
                return leaf and leaf.bind(shape)
            return broadcast(name, leaf, shape)

        return with_leaves(self, **{name: bound(name) for name in leaf_names(self)})

    def init(self, shape: tuple[int, int, int]) -> Any:
        """Arrays [layers, requests, kv_heads, ...] that it carries from event to event."""
        return None

    def thresholds(self, view: KeepView) -> Array:
        """float32 [B, 2]: a token below the first is not in the first of two tiers, and dropped
        below the second.
        """
        return jnp.zeros((len(view.seq_len), 2))

    def mark(self, state: Any, view: ScoreView, chooses: Array | None) -> tuple[Any, Array]:
        """The state of B heads and the scores [B, n] of all tokens, those to be dropped below the
        thresholds. `chooses` bool [B]: a prompt chunk has been read; None: in decode.
        """
        return state, view.scores

    def unmark(self, scores: Array) -> Array:
        """Inverse of `mark`, for tokens that stayed because their request found no page."""
        return scores

    def at_least(
        self, stored: np.ndarray, exact: np.ndarray, seen: np.ndarray, sinks: int, page: int
    ):
        """How many of `stored` tokens int [R, 1] stay whatever their scores, [L, R, K] or less.

        `seen`, `exact` count all tokens and those in the recent window; heads that share may leave
        a page of `page` tokens part-filled.
        """
        return np.minimum(stored, 1)

    def check_policy(self, policy: "CompressionPolicy") -> None:
        """Raise ValueError where the other stages do not go with it."""

    def uneven(self) -> Array | bool:
        """Whether layers get different amounts, so that one may wait for another's pages."""
        return False

    @property
    def marks(self) -> bool:
        return overrides(self, "mark", Keep)


def lines_of(keep: Keep, view: KeepView) -> Array:
    """`Keep.thresholds`, float32 [B, 2] whatever numbers the rule gives."""
    return numbers_of(keep, "thresholds", keep.thresholds(view), (len(view.seq_len), 2), "[B, 2]")


def broadcast(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """float32 `shape`.

    Raises:
        ValueError: it does not broadcast.
    """
    try:
        return np.broadcast_to(np.asarray(value, np.float32), shape)
    except ValueError:
        rule = f"must broadcast to [layers, requests, kv_heads] = {shape}"
        raise ValueError(
            f"{name}={shown(value)} {rule}: thresholds, budgets and recover do"
        ) from None


def meet(stage: Stage, *names: str) -> list[np.ndarray]:
    """The numbers of fields that broadcast together."""
    numbers = [np.asarray(getattr(stage, name)) for name in names]
    try:
        np.broadcast_shapes(*(array.shape for array in numbers))
    except ValueError:
        given = " and ".join(f"{name}={shown(getattr(stage, name))}" for name in names)
        rule = "must broadcast together, to [layers, requests, kv_heads]"
        raise ValueError(f"{given} {rule}") from None
    return numbers


class KeepAll(Keep):
    """Every token stays, in the first tier."""

    ranks = False

    def thresholds(self, view: KeepView) -> Array:
        return jnp.full((len(view.seq_len), 2), ALL)

    def at_least(self, stored, exact, seen, sinks, page):
        return stored


class Thresholds(Keep):
    """Thresholds on the mean attention, in units of uniform attention 1 / P after P tokens (DiffKV,
    arXiv 2412.03131 sec. 4): numbers, or nested lists that broadcast to [layers, requests,
    kv_heads]; layers counts those without a sliding window.

    Attributes:
        alpha_high: from here on a token is in the first tier.
        alpha_low: below it is dropped; 0 drops nothing.
    """

    alpha_high: Alpha = data(default=0.0, convert=alpha)
    alpha_low: Alpha = data(default=0.0, convert=alpha)
    ranks = False

    def check(self) -> None:
        high, low = meet(self, "alpha_high", "alpha_low")
        if np.any(low > high):
            raise ValueError(
                f"alpha_low={self.alpha_low} must not exceed alpha_high={self.alpha_high}: low "
                "tokens lie between the two"
            )

    def thresholds(self, view: KeepView) -> Array:
        limits = jnp.stack([jnp.asarray(self.alpha_high), jnp.asarray(self.alpha_low)], axis=-1)
        return limits / jnp.maximum(view.seq_len, 1)[:, None]

    def at_least(self, stored, exact, seen, sinks, page):
        return np.minimum(stored, 1) if np.any(np.asarray(self.alpha_low) > 0) else stored


class Budget(Keep):
    """So many tokens of each head stay, those in the recent window and the sinks included. Those
    with one score, where the line falls among them, go together, so that a head may hold fewer; in
    decode up to `flush - 1` tokens more wait for the next event.

    Attributes:
        keep: a share of the tokens seen (float up to 1), a number (int), memory for the whole cache
            such as "64MiB", out of which a number is made, or nested lists of shares or numbers
            that broadcast to [layers, requests, kv_heads].
        keep_high: with two tiers, how many stay in the first, likewise.
        layers: how budgets are spread over the layers: "uniform"; "pyramid" or "cosine", fewer with
            depth (`diffkv_jax.policy.spread`), `keep` being the mean.
        whole_layers: layers (those without a sliding window count) that keep everything.
        share_heads: the KV heads of a layer share their budgets, each keeps at least this share of
            its own (Ada-KV, arXiv:2407.11550); None: each has its own.
        share_layers: the heads of all layers share (KVzip), of scores with `passes`.
    """

    keep: Amount = data(default=0.5, convert=partial(budget, in_bytes=True))
    keep_high: Amount | None = data(default=None, convert=budget)
    layers: Literal["uniform", "pyramid", "cosine"] = static(
        default="uniform", convert=partial(one_of, choices=("uniform", *SPREADS))
    )
    whole_layers: tuple[int, ...] = static(
        default=(),
        convert=partial(
            tuple_of,
            each=from_zero,
            rule="a list of layers such as [0, 1]",
            entry_rule="numbers of layers: integers of at least 0",
        ),
    )
    share_heads: float | None = static(
        default=None,
        convert=partial(
            number,
            least=0,
            most=1,
            optional=True,
            rule="the share of its budget that each head keeps: from 0 to 1, or None",
        ),
    )
    share_layers: bool = static(default=False, convert=flag)  # pyright: ignore[reportIncompatibleVariableOverride]

    def check(self) -> None:
        if self.keep_high is not None:
            if self.in_bytes:
                return  # two tiers: `check_stages` says what is wrong
            high, keep = meet(self, "keep_high", "keep")
            if high.dtype.kind != keep.dtype.kind or np.any(high > keep):
                raise ValueError(
                    f"keep_high={self.keep_high} must be of the kind of keep={self.keep} and not "
                    "exceed it"
                )
        if self.share_layers and self.share_heads is None:
            raise ValueError(
                "share_layers=True shares budgets between layers, and so between heads: give "
                "share_heads= too, such as 0.0"
            )
        if self.share_layers and self.layers != "uniform":
            raise ValueError(
                f"layers={self.layers!r} spreads budgets over the layers, and share_layers=True "
                "lets scores do that: leave one out"
            )
        if self.share_layers and self.whole_layers:
            raise ValueError(
                f"whole_layers={self.whole_layers} keep everything, and share_layers=True shares "
                "their budgets: leave one out"
            )

    @property
    def in_bytes(self) -> bool:
        """Whether it is an amount of memory, of which a number of tokens is yet to be made."""
        return isinstance(self.keep, str)

    def bind(self, shape: tuple[int, int, int]) -> "Budget":
        counts = np.asarray(self.keep).dtype.kind == "i"
        whole = list(self.whole_layers)
        if beyond := [layer for layer in whole if not 0 <= layer < shape[0]]:
            rule = f"there is no layer {beyond[0]} of {shape[0]}"
            raise ValueError(f"whole_layers={self.whole_layers}: {rule}")
        keep = broadcast("keep", self.keep, shape)
        factor = np.ones(shape[0])
        if self.layers in SPREADS and shape[0]:
            factor = SPREADS[self.layers](shape[0], None if counts else keep.max())

        def spread(name: str) -> np.ndarray | None:
            if getattr(self, name) is None:
                return None
            each = broadcast(name, getattr(self, name), shape) * factor[:, None, None]
            if counts:  # more than any context has is as good as all
                each = np.minimum(np.floor(each + 1e-3), 2**30)
            each = each.astype(np.int32 if counts else np.float32)
            each[whole] = 2**30 if counts else 1.0
            return each

        amounts = {name: spread(name) for name in ("keep", "keep_high")}
        # what the amounts say now no program needs to be compiled by
        return with_leaves(self, **amounts, layers="uniform", whole_layers=())

    def thresholds(self, view: KeepView) -> Array:
        amounts = (self.keep if self.keep_high is None else self.keep_high, self.keep)
        columns = [
            self._threshold(_tokens(amount, view), view) for amount in amounts[-view.tiers :]
        ]
        return jnp.stack([columns[0], columns[-1]], axis=-1)

    def _threshold(self, tokens: Array, view: KeepView) -> Array:
        """The scores float32 [B] that as many tokens of each head reach as `tokens` float32 [B] has
        room for; of equal scores at the line none does.
        """
        scores, live = view.scores, view.live
        most = scores.shape[1]  # budgets of whole layers are larger, and a sum would overflow

        def room(tokens: Array) -> Array:
            return jnp.clip(jnp.floor(tokens + 1e-3) - view.exact, 0, most).astype(jnp.int32)

        if self.share_heads is None:
            return reached_by(scores, live, room(tokens))
        # Ada-KV: every head keeps a share of its own budget, the rest goes to the best of all.
        floor = reached_by(scores, live, room(tokens * self.share_heads))
        boosted = jnp.where(scores >= floor[:, None], PROTECTED, scores)
        scores, live = (x.reshape(-1, view.sharing * x.shape[1]) for x in (boosted, live))
        shared = reached_by(scores, live, room(tokens).reshape(-1, view.sharing).sum(axis=1))
        return jnp.minimum(jnp.repeat(shared, view.sharing), floor)

    def at_least(self, stored, exact, seen, sinks, page):
        keep = np.asarray(self.keep)
        kept = keep if keep.dtype.kind == "i" else np.floor(keep * seen).astype(np.int64)
        stored = np.minimum(stored, np.maximum(kept - exact, sinks))
        if self.share_heads is not None:  # heads share: one of them may have them all
            stored -= stored % page
        return stored

    def uneven(self) -> Array:
        keep = jnp.asarray(self.keep)
        return jnp.any(keep != keep[:1])


def _tokens(amount: Any, view: KeepView) -> Array:
    """A bound amount [B] as numbers of tokens, float32."""
    if jnp.issubdtype(amount.dtype, jnp.integer):
        return amount.astype(jnp.float32)
    return amount * view.seq_len
