"""`Score`: what ranks a token. A method's own score is a subclass in a file of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.arguments import integer, one_of, refuse
from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.decode_attention import Heads
from diffkv_jax.pallas_kernels.decode_attention.stream import Scale
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.pallas_kernels.prefill_attention import Chunk
from diffkv_jax.policy.fields import MOST_TOKENS
from diffkv_jax.policy.stage import Stage, numbers_of, overrides, static

if TYPE_CHECKING:
    from diffkv_jax.policy.policy import CompressionPolicy

PROTECTED = 1e30  # the score of tokens that always stay: finite, so that kernels may divide it


def is_protected(scores: Array) -> Array:
    """Which scores are those of tokens that always stay."""
    return scores >= PROTECTED / 2


def scores_of(stage: Stage, verb: str, value: Any, shape: tuple[int, ...]) -> Array:
    """Scores float32 [B, n] that a `verb` gave. NaN, which compares with nothing, is the lowest."""
    scores = numbers_of(stage, verb, value, shape, "[B, n]")
    return jnp.where(jnp.isnan(scores), -PROTECTED, scores)


class LeavingTokens(NamedTuple):
    """Tokens of the recent window (and the prompt chunk) of B heads, oldest first; those that stay
    too.
    """

    k: Array  # [B, n, head_dim] as the model made them, without the transform
    v: Array  # [B, n, head_dim] likewise
    scores: Array  # float32 [B, n] attention of scoring queries; zeros without any
    position: Array  # int32 [B, n]
    valid: Array  # bool [B, n] where there is a token
    head: Array  # int32 [B] a number for each layer and KV head, the same for all requests
    attention: AttentionSpec  # of the model


class PromptQueries(NamedTuple):
    """Queries of a prompt chunk at the B heads of a layer, C rows and G query heads each."""

    q: Array  # float32 [B, G, C, head_dim] without the transform, with the rotary embedding
    position: Array  # int32 [B, C]
    real: Array  # bool [B, C]; the others are padding
    first: Array  # bool [B] whether the request held nothing before this chunk
    attention: AttentionSpec
    sinks: int


@dataclass(frozen=True)
class ScoreView:
    """All tokens of a layer's B heads in one row each: the stored ones slot by slot, tier after
    tier, then those outside of the pages, in the recent window and the prompt chunk.
    """

    scores: Array  # float32 [B, n]
    position: Array  # int32 [B, n]
    live: Array  # bool [B, n] where there is a token
    leaving: Array  # bool [B, n] stored, or about to be
    protected: Array  # bool [B, n] tokens that always stay
    token_class: Callable[[], Array]  # uint8 [B, n], see `policy.protect`
    outside: int  # how many of the n are outside of the pages
    seq_len: Array  # int32 [B] tokens seen
    max_len: int  # positions are below it
    over_tokens: Callable[[Callable[[Array, Array], Any]], Any]
    attention: AttentionSpec
    policy: "CompressionPolicy"

    def by_position(self, values: Array, counted: Array, size: int) -> Array:
        """`values` [B, n] of the tokens `counted` bool [B, n] by their position: [B, size]; zeros
        where there is none.
        """
        rows = jnp.arange(values.shape[0])[:, None]
        at = jnp.where(counted, self.position, size)
        return jnp.zeros((len(values), size), values.dtype).at[rows, at].set(values, mode="drop")

    def from_position(self, values: Array) -> Array:
        """Inverse of `by_position`: `values` [B, size] at each token's position, [B, n]."""
        at = jnp.clip(self.position, 0, values.shape[1] - 1)
        return jnp.take_along_axis(values, at, axis=1)


class Pass(NamedTuple):
    """One more reading of a prompt, of which nothing is stored (`Score.passes`)."""

    tokens: np.ndarray  # int32 [R, C] right-aligned
    length: np.ndarray  # int32 [R] tokens of it
    first: int  # position from which on the prompt's tokens are scored


class PassLayer(NamedTuple):
    """One layer while a pass goes over the prompt again. B heads."""

    chunk: Chunk  # the pass
    pages: Pages
    layout: PageLayout
    heads: Heads  # page tables and recent windows
    scale: Scale
    seq_len: Array  # int32 [B] tokens seen
    first: Array  # int32 [] position from which on tokens are scored
    max_len: int
    sinks: int


def _queries(name: str, value: Any) -> Any:
    if isinstance(value, str) and value == "all":
        return "all"
    try:
        return integer(name, value, least=0, most=MOST_TOKENS)
    except ValueError as error:
        refuse(
            name, value, "a number of queries of at least 0, or 'all'", isinstance(error, TypeError)
        )


class Score(Stage):
    """What ranks a token: the larger, the longer it stays. A subclass overrides the verbs in which
    it differs from attention added up (H2O); a default adds no operation to the program.

    Attributes:
        queries: how many of a prompt's last queries score tokens by their attention, or "all"; 0:
            none do, and `LeavingTokens.scores` are zeros.
        reduce: how the query heads of a KV head become one score, "max" or "mean".
        in_decode: whether tokens leave after the prompt too; then each decode step's attention is
            added (unless `queries` is 0). Else the policy decides once a prompt.
        per_query: whether a score is divided by the number of queries that gave it.
        resets: whether earlier queries are forgotten when the policy decides.
        horizon: a token's score is a mean over about so many of the last queries (a sum without
            `per_query`): what earlier ones gave is scaled down at each event. None: all count
            alike.
        shares_tokens: whether all KV heads of a layer have the same scores (`rescore` sees to that)
            and so keep the same tokens: their budgets must be equal.
        hides_dropped: whether a prompt token that a layer drops is not there for deeper layers.
    """

    queries: int | Literal["all"] = static(default=0, convert=_queries)
    reduce: Literal["max", "mean"] = static(
        default="max", convert=lambda name, value: one_of(name, value, ("max", "mean"))
    )
    in_decode: ClassVar[bool] = True
    per_query: ClassVar[bool] = False
    resets: ClassVar[bool] = False
    shares_tokens: ClassVar[bool] = False

    @property
    def horizon(self) -> int | None:
        return None

    @property
    def hides_dropped(self) -> bool:
        return False

    def init(self, attention: AttentionSpec, layers: int, requests: int) -> Any:
        """Arrays [layers, requests, kv_heads, ...] that the score carries from chunk to chunk."""
        return None

    def query_weights(self, index: Array, count: Array) -> Array:
        """What each scoring query of a prompt counts, float32: the `index`-th of `count` ints."""
        return jnp.ones_like(index, jnp.float32)

    def on_prompt(self, state: Any, queries: PromptQueries) -> Any:
        """The state of a layer's B heads after a prompt chunk has passed it."""
        return state

    def enter(self, tokens: LeavingTokens) -> Array:
        """The scores float32 [B, n] that tokens have from now on, when they leave the window."""
        return tokens.scores

    def rescore(self, state: Any, view: ScoreView) -> Array:
        """New scores float32 [B, n] of all tokens before the policy decides. Plain XLA.

        They replace those that the tokens had: in decode, attention is added to them and the next
        event gives the sums here again. Protected tokens, and heads from which nothing leaves, stay
        as they are. With `per_query` they are divided by the number of queries afterwards.
        """
        return view.scores

    def check_prompts(self, attention: AttentionSpec, lengths: np.ndarray) -> None:
        """Refuse prompts of `lengths` int [R] that `passes` cannot go over (ValueError)."""

    def passes(self, tokens: np.ndarray, lengths: np.ndarray) -> Iterator[Pass]:
        """Further readings of prompts `tokens` [R, N] of `lengths` [R] (KVzip). A score that has
        some decides after the last of them, once, and never in decode.
        """
        return iter(())

    def score_pass(self, layer: PassLayer) -> Array:
        """The pool's scores (`Pages.significance`) after a pass has gone through a layer."""
        raise NotImplementedError

    @property
    def accumulates(self) -> bool:
        """Whether every decode step adds to the scores."""
        return self.queries != 0 and self.in_decode

    @property
    def rescores(self) -> bool:
        return overrides(self, "rescore", Score)

    @property
    def has_passes(self) -> bool:
        return overrides(self, "passes", Score)


class KeyScore(Score):
    """The base of scores that need no attention of the prompt's last queries."""

    def check(self) -> None:
        if self.queries:
            raise ValueError(
                f"{type(self).__name__} looks at no queries' attention: "
                f"leave queries={self.queries!r} out"
            )
