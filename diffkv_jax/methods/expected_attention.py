"""ExpectedAttention (arXiv:2510.00636): scores are the attention that queries like the prompt's
will give, times the value's norm.
"""

from functools import partial
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.methods.evicting import Options, evicting
from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.codecs.scales import length
from diffkv_jax.pallas_kernels.rope import at_positions, turn_pairs
from diffkv_jax.policy.fields import share, tokens
from diffkv_jax.policy.keep import Amount, Budget
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.score import KeyScore, PromptQueries, ScoreView
from diffkv_jax.policy.stage import static


class QueryStatistics(NamedTuple):
    """Mean and covariance of a prompt's queries without their rotary embedding, of every query head
    (K KV heads, G query heads each): all prompts of a request, without its sinks.
    """

    seen: Array  # float32 [..., K] queries counted
    mean: Array  # float32 [..., K, G, head_dim]
    covariance: Array  # float32 [..., K, G, head_dim, head_dim]


class ExpectedAttention(KeyScore):
    """The attention that queries to come can be expected to give; decides once a prompt.

    A key's score is `(mean_j softmax_t(s k_t . mu_j + s^2 k_t . Sigma_j k_t / 2) + epsilon) |v_t|`
    over the query heads j of the group and all tokens t but the sinks, `s` the model's factor on
    logits: what a normally distributed query gives on average. A soft cap of the logits is left
    out.

    Attributes:
        future: how many positions after the prompt the queries to come may have.
        epsilon: what is added to attention before it is multiplied with the value's norm.
    """

    future: int = static(default=512, convert=tokens, length=True)
    epsilon: float = static(default=0.0, convert=share)
    in_decode = False

    def init(self, attention: AttentionSpec, layers: int, requests: int) -> QueryStatistics:
        if attention.rope is None:
            raise ValueError(
                "ExpectedAttention ranks by queries without their rotary embedding, and the model "
                "does not tell it (AttentionSpec.rope)"
            )
        heads = (layers, requests, attention.num_kv_heads)
        d = attention.head_dim
        channels = (*heads, attention.num_q_heads // attention.num_kv_heads, d)
        return QueryStatistics(jnp.zeros(heads), jnp.zeros(channels), jnp.zeros((*channels, d)))

    def on_prompt(self, state: QueryStatistics, queries: PromptQueries) -> QueryStatistics:
        assert queries.attention.rope is not None  # `init` refuses
        counted = queries.real & (queries.position >= queries.sinks)
        position = queries.position[:, None]
        q = at_positions(queries.q, position, queries.attention.rope, back=True)
        seen = jnp.where(queries.first, 0, state.seen)
        return with_queries(state._replace(seen=seen), q, counted)

    def rescore(self, state: QueryStatistics, view: ScoreView) -> Array:
        mean, covariance = self.queries_to_come(state, view)
        exponents, norms = view.over_tokens(
            lambda k, v: (_exponents(k, mean, covariance), length(v)[..., 0])
        )
        counted = view.live & (view.position >= view.policy.protect.sinks)
        logits = jnp.where(counted[:, None], exponents, -jnp.inf)
        return (jax.nn.softmax(logits, axis=-1).mean(axis=1) + self.epsilon) * norms

    def queries_to_come(self, state: QueryStatistics, view: ScoreView) -> tuple[Array, Array]:
        """Mean [B, G, d] and covariance [B, G, d, d] of queries, times the factor on logits.

        Turned by the rotary embedding averaged over the next `future` positions.
        """
        attention = view.attention
        position = (view.seq_len[:, None] + jnp.arange(self.future)).astype(jnp.float32)
        angle = position[..., None] * jnp.asarray(attention.rope, jnp.float32)
        cos, sin = (x(angle).mean(axis=1)[:, None] for x in (jnp.cos, jnp.sin))  # [B, 1, d / 2]

        # symmetric: the other side likewise
        half = turn_pairs(state.covariance, cos[:, None], sin[:, None])
        covariance = turn_pairs(jnp.swapaxes(half, -1, -2), cos[:, None], sin[:, None])
        scale = attention.sm_scale
        return scale * turn_pairs(state.mean, cos, sin), scale**2 * covariance


def with_queries(before: QueryStatistics, q: Array, counted: Array) -> QueryStatistics:
    """The statistics of one layer `[B, ...]` after the rows `counted` bool [B, C] of `q` float32
    [B, G, C, d].

    Two sets' covariances are joined with the outer product of their means' difference (Chan et al.
    1979): no difference of large sums.
    """
    rows = counted[:, None, :, None]
    count = counted.sum(axis=1).astype(jnp.float32)
    total = before.seen + count
    part = (count / jnp.maximum(total, 1))[:, None, None]  # of the new rows
    each = jnp.maximum(count, 1)[:, None, None]
    mean = jnp.where(rows, q, 0).sum(axis=2) / each
    centred = jnp.where(rows, q - mean[:, :, None], 0)
    covariance = (
        jnp.einsum("bgci,bgcj->bgij", centred, centred, precision=lax.Precision.HIGHEST)
        / each[..., None]
    )
    apart = mean - before.mean
    between = part[..., None] * (1 - part[..., None]) * apart[..., :, None] * apart[..., None, :]
    joined = before.covariance + part[..., None] * (covariance - before.covariance) + between
    return QueryStatistics(total, before.mean + part * apart, joined)


def _exponents(k: Array, mean: Array, covariance: Array) -> Array:
    """`k . mean + k . covariance k / 2`, [B, G, n], of `k [B, n, d]`."""
    einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    spread = einsum("bnj,bgij->bgni", k, covariance)
    return einsum("bnd,bgd->bgn", k, mean) + 0.5 * einsum("bgni,bni->bgn", spread, k)


def expected_attention(
    keep: Amount = 0.5, *, future: int = 512, epsilon: float = 0.0, **options: Unpack[Options]
) -> CompressionPolicy:
    """ExpectedAttention: what queries like the prompt's, at the next `future` positions, can be
    expected to attend to.
    """
    score = ExpectedAttention(future=future, epsilon=epsilon)
    return evicting("expected_attention", score, Budget(keep=keep), **options)
