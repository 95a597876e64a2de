"""FastGen (arXiv:2310.01801): each head keeps the cheapest union of token classes that holds enough
of its attention.

The tokens that go get negative scores, and the threshold is 0: events and kernels know nothing of
classes.
"""

from functools import partial
from typing import ClassVar, Unpack

import jax.numpy as jnp
from jax import Array

from diffkv_jax.arguments import nested, number, token_ids
from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.methods.h2o import AttentionSum
from diffkv_jax.policy.fields import AXES, share
from diffkv_jax.policy.keep import Alpha, Keep
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.ranking import reached_by
from diffkv_jax.policy.score import ScoreView
from diffkv_jax.policy.stage import data, static

HEAD_POLICIES = (
    "special",
    "special, punctuation",
    "special, punctuation, frequent",
    "special, punctuation, frequent, local",
    "full",
)
FULL = len(HEAD_POLICIES) - 1
_SPECIAL, _PUNCTUATION = 1, 2  # token classes
_recover = partial(
    number,
    above=0,
    most=1,
    rule="the share of its attention that a head must hold: above 0 and up to 1",
)


class HeadClasses(Keep):
    """After each prompt every head picks the cheapest of `HEAD_POLICIES`.

    Attributes:
        recover: the share of its attention (up to 1) that a head must hold: a number, or nested
            lists that broadcast to [layers, requests, kv_heads].
        punctuation: token ids of that class.
        frequent, local: how many tokens those classes hold, as shares of the tokens seen: the most
            attended, the most recent.
    """

    recover: Alpha = data(
        default=0.95, convert=lambda name, value: nested(name, value, _recover, axes=AXES)
    )
    punctuation: tuple[int, ...] = static(default=(), convert=token_ids)
    frequent: float = static(default=0.3, convert=share)
    local: float = static(default=0.3, convert=share)
    ranks: ClassVar[bool] = False
    protects: ClassVar[bool] = True

    @property
    def token_classes(self) -> tuple[tuple[int, ...], ...]:
        return (self.punctuation,)

    def check_policy(self, policy: CompressionPolicy) -> None:
        score = policy.score
        fits = isinstance(score, AttentionSum) and score.reduce == "mean" and score.queries != "all"
        if not fits:
            raise ValueError(
                f"recover={self.recover} measures attention by AttentionSum(queries= a number, "
                f"reduce='mean'), given score={score}"
            )
        if both := set(policy.protect.token_ids) & set(self.punctuation):
            raise ValueError(
                f"protect and punctuation both name token ids {sorted(both)}: give each one class"
            )
        if len(policy.tiers) != 1:
            raise ValueError(
                f"recover={self.recover} keeps or drops: tiers={policy.tiers} must be one format"
            )

    def init(self, shape: tuple[int, int, int]) -> Array:
        """The policy of each head, one of `HEAD_POLICIES`: int32 [layers, requests, kv_heads]."""
        return jnp.zeros(shape, jnp.int32)

    def mark(self, state: Array, view: ScoreView, chooses: Array | None) -> tuple[Array, Array]:
        """Negative scores for what a head's policy does not keep; `chooses`: heads that pick one
        now.
        """
        every = jnp.where(view.live, view.scores, -jnp.inf)
        level = self._levels(every, view)
        if chooses is not None:
            picked = _cheapest(level, jnp.maximum(every, 0), jnp.asarray(self.recover))
            state = jnp.where(chooses, picked, state)
        outside = view.leaving[:, view.leaving.shape[1] - view.outside :]
        gone = (level > state[:, None]) & view.leaving & outside.any(axis=1)[:, None]
        marked = jnp.where(gone, -jnp.maximum(every, jnp.finfo(jnp.float32).tiny), every)
        return state, jnp.where(view.live, marked, view.scores)

    def unmark(self, scores: Array) -> Array:
        return jnp.abs(scores)

    def _levels(self, scores: Array, view: ScoreView) -> Array:
        """int32 [B, n]: the cheapest of `HEAD_POLICIES` that keeps each token. `scores` are -inf
        where there is none.
        """
        classes, seq_len = view.token_class(), view.seq_len
        frequent, local = (
            jnp.floor(part * seq_len + 1e-3).astype(jnp.int32)
            for part in (self.frequent, self.local)
        )
        often = scores >= reached_by(scores, scores > -jnp.inf, frequent)[:, None]
        recent = view.position >= (seq_len - local)[:, None]
        level = jnp.where(often, 2, jnp.where(recent, 3, FULL))
        level = jnp.where(classes == _PUNCTUATION, 1, level)
        return jnp.where(classes == _SPECIAL, 0, level)


def _cheapest(level: Array, scores: Array, recover: Array) -> Array:
    """int32 [B]: the first policy whose tokens have got `recover [B]` of all attention that was
    seen, `scores [B, n]`; else all of them.
    """
    kept = jnp.stack([jnp.where(level <= policy, scores, 0).sum(axis=1) for policy in range(FULL)])
    return (kept < recover * scores.sum(axis=1)).sum(axis=0, dtype=jnp.int32)


def fastgen(
    recover: Alpha = 0.95,
    *,
    punctuation: tuple[int, ...] = (),
    frequent: float = 0.3,
    local: float = 0.3,
    queries: int = 64,
    **options: Unpack[Options],
) -> CompressionPolicy:
    """FastGen: five unions of token classes, each with the ones before: special, punctuation,
    frequent, local, all.

    Give the ids of `diffkv_jax.token_classes(tokenizer)` as `protect` and `punctuation`; sinks
    count as protected.
    """
    keep = HeadClasses(recover=recover, punctuation=punctuation, frequent=frequent, local=local)
    return evicting("fastgen", AttentionSum(queries=queries, reduce="mean"), keep, **options)
