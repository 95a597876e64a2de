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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k", "v", "add_k", "add_v"],
    meta_fields=["attention"],
)
@dataclass(frozen=True)
class Probe:
    """Takes a cache's place in `CausalLM.apply`. All arrays float32 `[layers, N, kv_heads, d]`.

    With a latent (`AttentionSpec.latent`) values are part of the keys, and `v` has no channels.
    """

    attention: AttentionSpec
    k: Array  # after RoPE, filled layer by layer
    v: Array
    add_k: Array  # added to the keys before attention: the loss' gradient by it is that by the keys
    add_v: Array

    @staticmethod
    def empty(attention: AttentionSpec, tokens: int) -> "Probe":
        """A probe of one sequence of N = `tokens` tokens that adds nothing."""
        shape = (attention.num_layers, tokens, attention.num_kv_heads)
        keys = jnp.zeros((*shape, attention.head_dim), jnp.float32)
        # as `attend` is given them
        values = keys if attention.latent is None else jnp.zeros((*shape, 0), jnp.float32)
        return Probe(attention, keys, values, keys, values)

    def attend(self, layer: Array, q: Array, k: Array, v: Array) -> tuple[Array, "Probe"]:
        """`attend` of the cache for one sequence: `q [1, N, num_q_heads, d]`, `k`, `v [1, N,
        num_kv_heads, d]`, positions 0 to N - 1.
        """
        k, v = k.astype(jnp.float32) + self.add_k[layer], v.astype(jnp.float32) + self.add_v[layer]
        kept_k, kept_v = (
            lax.dynamic_update_slice_in_dim(x, lax.stop_gradient(new), layer, 0)
            for x, new in ((self.k, k), (self.v, v))
        )
        windows = jnp.asarray(
            [q.shape[1] if window is None else window for window in self.attention.sliding_windows]
        )
        mixed = v[0] if self.attention.latent is None else k[0, ..., : self.attention.latent]
        out = _causal_attention(
            self.attention, windows[layer], q[0].astype(jnp.float32), k[0], mixed
        )
        return out[None].astype(q.dtype), replace(self, k=kept_k, v=kept_v)


# the backward pass takes the weights anew: those of all layers would not fit
@partial(jax.checkpoint, static_argnums=0)
def _causal_attention(
    attention: AttentionSpec, window: Array, q: Array, k: Array, v: Array
) -> Array:
    """softmax(cap(scale q k)) v over the `window` last tokens: `q [N, num_q_heads, d]`, `k`, `v [N,
    num_kv_heads, d]`.
    """
    n, kv_heads, d = k.shape
    logits = jnp.einsum("tkgd,skd->kgts", q.reshape(n, kv_heads, -1, d), k) * attention.sm_scale
    behind = jnp.arange(n)[:, None] - jnp.arange(n)
    seen = (behind >= 0) & (behind < window)
    logits = jnp.where(seen, soft_cap(logits, attention.logits_soft_cap), -jnp.inf)
    out = jnp.einsum("kgts,skd->tkgd", jax.nn.softmax(logits, axis=-1), v)
    return out.reshape(*q.shape[:-1], -1)


class Activations(NamedTuple):
    """Keys (after RoPE), values, and the gradients of the loss by them: float32 `[layers, N,
    kv_heads, head_dim]`.
    """

    k: Array
    v: Array
    k_gradient: Array
    v_gradient: Array


@partial(jax.jit, static_argnames=("model", "gradients"))
def activations(
    model: CausalLM, params: Mapping[str, Any], tokens: Array, *, gradients: bool = True
) -> Activations:
    """What a model makes of one sequence int32 `[N]`; the loss is the mean over next tokens of the
    negative log-likelihood.

    Without `gradients` they are zeros, and nothing is differentiated.
    """
    probe = Probe.empty(model.attention, len(tokens))

    def loss(added: tuple[Array, Array]) -> tuple[Array, Probe]:
        probing = replace(probe, add_k=added[0], add_v=added[1])
        logits, seen = model.apply(
            {"params": params}, tokens[None], jnp.arange(len(tokens))[None], probing
        )
        log_probs = jax.nn.log_softmax(logits[0, :-1])
        return -jnp.take_along_axis(log_probs, tokens[1:, None], axis=-1).mean(), seen

    nothing = (probe.add_k, probe.add_v)
    if not gradients:
        _, seen = loss(nothing)
        return Activations(seen.k, seen.v, *nothing)
    (k_gradient, v_gradient), seen = jax.grad(loss, has_aux=True)(nothing)
    return Activations(seen.k, seen.v, k_gradient, v_gradient)
