"""How a policy ranks tokens: `Selection`, the static choices, and the score that a token enters the
tiers with (docs/design.md 9).
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.pallas_kernels.apply_event import Tokens
from diffkv_jax.pallas_kernels.codecs.scales import length
from diffkv_jax.policy.replay import Replay

Score = Literal[
    "attention",
    "attention_sum",
    "window",
    "last_query",
    "key_norm",
    "key_difference",
    "recency",
    "random",
    "expected",
    "replay",
]
BY_ATTENTION = ("attention", "attention_sum", "window", "last_query")
BY_KEY = ("key_norm", "key_difference", "recency", "random")
BY_FORECAST = ("expected",)
BY_REPLAY = ("replay",)
PROTECTED = 1e30  # the score of tokens that always stay: finite, so that kernels may divide it


@dataclass(frozen=True)
class Selection:
    """What the compiler must know of how tokens are ranked and selected.

    Attributes:
        score: what a token's stored significance is. Attention that it got from scoring queries:
            "attention" their mean (DiffKV), "attention_sum" (H2O), "window" that of the prompt's
            last queries alone (SnapKV), "last_query" (TOVA). Without queries: "key_norm" (the
            smaller the better), "key_difference" (unlike the mean key), "recency", "random".
            "expected": by the attention that queries to come can be expected to give, once a prompt
            (ExpectedAttention). "replay": by the largest attention while the prompt is gone over
            again (KVzip). None: no ranking.
        group: how the query heads of a KV head are reduced to one score.
        observe: how many of the last prompt queries score, "all", or None.
        sinks: first tokens of a request that always stay.
        pooling: width of the moving average over positions, of "window" scores.
        budgeted: budgets decide how many tokens stay, else thresholds on the mean attention.
        in_tokens: budgets are numbers of tokens, else shares of the tokens seen.
        pooled: the heads of a layer share a budget, each has at least this share of its own part
            (Ada-KV); None: a budget a head.
        across_layers: the heads of all layers share it (KVzip).
        replay: what the model reads when it goes over the prompt again.
        future: how many positions after the prompt "expected" queries may have.
        epsilon: what "expected" adds to attention before it is multiplied with the value's norm.
        newest_weight: what the last of the prompt queries that score counts, the first of them 1
            (PyramidInfer).
        shared: the heads of a layer keep the same tokens: scores are averaged over them.
        nested: a prompt token that a layer drops is not there for deeper layers
            (`diffkv_jax.methods.pyramidinfer`).
        protect, punctuation: token ids of the classes that always stay and that heads may choose to
            keep.
        profiled: each head chooses classes of tokens to keep (FastGen,
            `diffkv_jax.methods.fastgen`), `frequent` and `local` shares of them.
    """

    score: Score | None = None
    group: Literal["max", "mean"] = "max"
    observe: int | Literal["all"] | None = None
    sinks: int = 0
    pooling: int = 1
    budgeted: bool = False
    in_tokens: bool = False
    pooled: float | None = None
    across_layers: bool = False
    replay: Replay | None = None
    future: int = 512
    epsilon: float = 0.0
    newest_weight: float = 1.0
    shared: bool = False
    nested: bool = False
    protect: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()
    profiled: bool = False
    frequent: float = 0.3
    local: float = 0.3

    @property
    def classed(self) -> bool:
        """Whether the classes of tokens must be known."""
        return bool(self.protect or self.punctuation)

    @property
    def by_attention(self) -> bool:
        """Whether prompt queries score."""
        return self.score in BY_ATTENTION

    @property
    def accumulates(self) -> bool:
        """Whether every decode step adds to the scores."""
        return self.by_attention and self.score != "window"

    @property
    def averaged(self) -> bool:
        """Whether a score is divided by the number of queries that gave it."""
        return self.score == "attention"

    @property
    def starts_anew(self) -> bool:
        """Whether earlier queries' scores are forgotten when the policy decides."""
        return self.score in ("window", "last_query")

    @property
    def in_decode(self) -> bool:
        """Whether tokens leave their tier after the prompt too."""
        return self.score not in (None, "window", *BY_FORECAST, *BY_REPLAY)


def ranked_tokens(
    selection: Selection,
    tokens: Tokens,
    valid: Array,
    head: Array,
    protected: Array | None = None,
    latent: int | None = None,
) -> Tokens:
    """`tokens` with the significance that they enter the tiers with.

    Args:
        tokens: of `B` heads `[B, n, ...]`, the significance is what attention gave them.
        valid: bool `[B, n]`, where there is a token.
        head: int32 `[B]`, a number for each layer and KV head, the same for all requests.
        protected: bool `[B, n]`, tokens that always stay; None: none do.
        latent: as in `AttentionSpec`; these first channels have been normalised, so that the others
            alone make up a "key_norm".
    """
    score = tokens.significance
    if selection.score == "key_norm":  # arXiv:2406.11430
        score = -_told_apart(
            length(tokens.k[..., latent:].astype(jnp.float32))[..., 0], tokens.position
        )
    elif selection.score == "key_difference":
        score = -_likeness(tokens.k.astype(jnp.float32), valid)
    elif selection.score == "recency":
        score = tokens.position.astype(jnp.float32)
    elif selection.score == "random":
        score = _hashed(
            tokens.position.astype(jnp.uint32) + (head.astype(jnp.uint32) << 20)[:, None]
        )
    if protected is not None:
        score = jnp.where(protected, PROTECTED, score)
    return tokens._replace(significance=score)


def is_protected(scores: Array) -> Array:
    """Which scores are those of tokens that always stay."""
    return scores >= PROTECTED / 2


def _told_apart(norm: Array, position: Array) -> Array:
    """Norms rounded to 15 bits, and below them the position, the later token with the smaller
    number.

    In the first layer keys of equal tokens have equal norms but for rounding, which differs from
    batch to batch.
    """
    bits = lax.bitcast_convert_type(norm, jnp.uint32)
    bits = ((bits + jnp.uint32(0x80)) & jnp.uint32(0xFFFFFF00)) | (
        ~position.astype(jnp.uint32) & jnp.uint32(0xFF)
    )
    return lax.bitcast_convert_type(bits, jnp.float32)


def _likeness(k: Array, valid: Array) -> Array:
    """Cosine of each key `[B, n, d]` with the mean of the valid unit keys: `[B, n]` (KeyDiff,
    arXiv:2504.15364).
    """
    unit = k / jnp.maximum(length(k), 1e-30)
    # the length of the mean does not matter
    anchor = jnp.where(valid[..., None], unit, 0.0).sum(axis=1)
    return (unit * anchor[:, None]).sum(axis=-1) / jnp.maximum(
        jnp.linalg.norm(anchor, axis=-1), 1e-12
    )[:, None]


def _hashed(x: Array) -> Array:
    """Well mixed uint32 as float32 in [0, 1): the same for the same token and head in every run."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return ((x ^ (x >> 16)) >> 8).astype(jnp.float32) / (1 << 24)
