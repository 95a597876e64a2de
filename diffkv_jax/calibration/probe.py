"""`Probe`: stands where a cache would, attends plainly, and shows the keys and values of every
layer and what the loss makes of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.model import AttentionSpec, CausalLM
from diffkv_jax.pallas_kernels.decode_attention.stream import soft_cap

FIRST_TOKENS = 16  # of a text, whose keys are like no others


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "add_k", "add_v", "queries", "weight"],
    meta_fields=["attention"],
)
@dataclass(frozen=True)
class Probe:
    """Takes a cache's place in `CausalLM.apply`. Arrays are float32 `[layers, N, kv_heads, d]`.

    With a latent (`AttentionSpec.latent`) values are part of the keys, and `v` has no channels.
    """

    attention: AttentionSpec
    k: Array  # after RoPE, filled layer by layer
    v: Array
    add_k: Array  # added to the keys before attention: the loss' gradient by it is that by the keys
    add_v: Array
    queries: Array  # [layers, kv_heads, d, d] their second moments, but of the `FIRST_TOKENS`
    weight: Array  # [layers, N, kv_heads] squared attention that a token gets, summed over queries

    @staticmethod
    def empty(attention: AttentionSpec, tokens: int) -> "Probe":
        """A probe of one sequence of N = `tokens` tokens that adds nothing."""
        shape = (attention.num_layers, tokens, attention.num_kv_heads)
        keys = jnp.zeros((*shape, attention.head_dim), jnp.float32)
        # as `attend` is given them
        values = keys if attention.latent is None else jnp.zeros((*shape, 0), jnp.float32)
        heads = (attention.num_kv_heads, attention.head_dim, attention.head_dim)
        moments = jnp.zeros((attention.num_layers, *heads), jnp.float32)
        return Probe(attention, keys, values, keys, values, moments, keys[..., 0])

    def attend(self, layer: Array, q: Array, k: Array, v: Array) -> tuple[Array, "Probe"]:
        """`attend` of the cache for one sequence: `q [1, N, num_q_heads, d]`, `k`, `v [1, N,
        num_kv_heads, d]`, positions 0 to N - 1.
        """
        k, v = k.astype(jnp.float32) + self.add_k[layer], v.astype(jnp.float32) + self.add_v[layer]
        kept_k, kept_v = (
            lax.dynamic_update_slice_in_dim(x, lax.stop_gradient(new), layer, 0)
            for x, new in ((self.k, k), (self.v, v))
        )
        exact = q[0].astype(jnp.float32)
        out, weight = causal_attention(self.attention, layer, exact, k[0], v[0])
        moments, weight = (
            x.at[layer].set(lax.stop_gradient(new))
            for x, new in ((self.queries, _moments(exact, k.shape[2])), (self.weight, weight))
        )
        seen = replace(self, k=kept_k, v=kept_v, queries=moments, weight=weight)
        return out[None].astype(q.dtype), seen


def _moments(q: Array, kv_heads: int) -> Array:
    """Second moments `[kv_heads, d, d]` of queries `[N, num_q_heads, d]`."""
    usual = q[FIRST_TOKENS if len(q) > FIRST_TOKENS else 0 :]
    heads = usual.reshape(len(usual), kv_heads, -1, q.shape[-1])
    total = jnp.einsum("nkgd,nkge->kde", heads, heads, precision=lax.Precision.HIGHEST)
    return total / (heads.shape[0] * heads.shape[2])


# the backward pass takes the weights anew: those of all layers would not fit
@partial(jax.checkpoint, static_argnums=0)
def causal_attention(
    attention: AttentionSpec, layer: Array, q: Array, k: Array, v: Array
) -> tuple[Array, Array]:
    """softmax(cap(scale q k)) v of one sequence in a layer: float32 `q [N, num_q_heads, d]`, `k`,
    `v [N, num_kv_heads, d]` (or latents), as `attend` is given them; and each token's squared
    attention, summed, `[N, num_kv_heads]`.
    """
    n, kv_heads, d = k.shape
    window = jnp.asarray([n if one is None else one for one in attention.sliding_windows])[layer]
    v = v if attention.latent is None else k[..., : attention.latent]
    logits = jnp.einsum("tkgd,skd->kgts", q.reshape(n, kv_heads, -1, d), k) * attention.sm_scale
    behind = jnp.arange(n)[:, None] - jnp.arange(n)
    seen = (behind >= 0) & (behind < window)
    logits = jnp.where(seen, soft_cap(logits, attention.logits_soft_cap), -jnp.inf)
    given = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("kgts,skd->tkgd", given, v)
    return out.reshape(*q.shape[:-1], -1), jnp.square(given).sum(axis=(1, 2)).T


class Activations(NamedTuple):
    """Keys (after RoPE), values, and the gradients of the loss by them: float32 `[layers, N,
    kv_heads, head_dim]`; the queries' second moments `[layers, kv_heads, head_dim, head_dim]`,
    and the squared attention that each token gets `[layers, N, kv_heads]`.
    """

    k: Array
    v: Array
    k_gradient: Array
    v_gradient: Array
    queries: Array
    weight: Array


@partial(jax.jit, static_argnames=("model", "gradients"))
def activations(
    model: CausalLM,
    params: Mapping[str, Any],
    tokens: Array,
    first: Array | int = 0,
    *,
    gradients: bool = True,
) -> Activations:
    """What a model makes of one sequence int32 `[N]` at positions from `first` on; the loss is the
    mean over next tokens of the negative log-likelihood.

    Without `gradients` they are zeros, and nothing is differentiated.
    """
    probe = Probe.empty(model.attention, len(tokens))

    def loss(added: tuple[Array, Array]) -> tuple[Array, Probe]:
        probing = replace(probe, add_k=added[0], add_v=added[1])
        logits, seen = model.apply(
            {"params": params}, tokens[None], first + jnp.arange(len(tokens))[None], probing
        )
        log_probs = jax.nn.log_softmax(logits[0, :-1])
        return -jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1).mean(), seen

    nothing = (probe.add_k, probe.add_v)
    if not gradients:
        _, seen = loss(nothing)
        return Activations(seen.k, seen.v, *nothing, seen.queries, seen.weight)
    (k_gradient, v_gradient), seen = jax.grad(loss, has_aux=True)(nothing)
    return Activations(seen.k, seen.v, k_gradient, v_gradient, seen.queries, seen.weight)
