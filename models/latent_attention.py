"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): plain over given
tokens, absorbed over a cache.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffkv_jax.steps.attend import attend, kernels_of

from .config import ModelConfig
from .deepseek_config import LatentSizes
from .layers import Projection, RMSNorm, project
from .plain_attention import plain_attention
from .rope import apply_rope
from .self_attention import LayerData, SharedData, score_scale
from .switches import Switches

_EPS = 1e-6  # of the two inner norms, whatever the config says of the others


class LatentAttention(nn.Module):
    """A token's keys and values come from one latent c (after its norm) and one rotary key k_R.

    Without a cache they are made and attended to. A cache keeps c and k_R only, and attention
    happens in their space: the projection W_UK of c to a head's keys goes to the query (q W_UK' is
    compared with c), that to its values to the output.
    """

    config: ModelConfig
    switches: Switches
    dtype: str
    param_dtype: str

    @property
    def _sizes(self) -> LatentSizes:
        assert self.config.latent is not None  # else this is not the module of the layer
        return self.config.latent

    def _projection(
        self, name: str, inputs: int, features: int, use_bias: bool = False
    ) -> Projection:
        return Projection(
            self.config.num_hidden_layers, inputs, features, use_bias, self.param_dtype, name=name
        )

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(_EPS, False, self.param_dtype, self.config.num_hidden_layers, name=name)

    @nn.compact
    def __call__(
        self, hidden: jax.Array, cache: Any, data: LayerData, shared: SharedData
    ) -> tuple[jax.Array, Any]:
        """hidden [B, T, hidden_size] -> the same shape, and the cache."""
        sizes, heads, kernels = self._sizes, self.config.num_attention_heads, kernels_of(cache)
        rank, nope, bias = sizes.kv_lora_rank, sizes.qk_nope_head_dim, self.switches.qkv_bias
        q = self._queries(hidden, data, kernels).reshape(*hidden.shape[:-1], heads, -1)
        inwards = self._projection(
            "kv_a_proj_with_mqa", hidden.shape[-1], rank + sizes.qk_rope_head_dim, bias
        )
        both = project(hidden, [inwards], data.layer, self.dtype, kernels)[0]
        latent = self._norm("kv_a_layernorm")(both[..., :rank], data.layer, kernels)
        q_rope, k_rope = (
            self._embedded(x, data, shared) for x in (q[..., nope:], both[..., None, rank:])
        )
        upwards = self._projection("kv_b_proj", rank, heads * (nope + sizes.v_head_dim))
        if cache is None:
            kv = project(latent, [upwards], data.layer, self.dtype, kernels)[0].reshape(
                *q.shape[:-1], -1
            )
            k = jnp.concatenate([kv[..., :nope], jnp.broadcast_to(k_rope, q_rope.shape)], axis=-1)
            q = jnp.concatenate([q[..., :nope], q_rope], axis=-1)
            scale = score_scale(self.config)
            out = plain_attention(
                q,
                k,
                kv[..., nope:],
                shared.positions,
                data.window,
                sm_scale=scale,
                logits_soft_cap=None,
            )
        else:
            up = upwards.kernel[data.layer].astype(self.dtype).reshape(rank, heads, -1)
            # one head, and its first channels are the values
            k = jnp.concatenate([latent[..., None, :], k_rope], axis=-1)
            q = jnp.concatenate(
                [jnp.einsum("bthn,rhn->bthr", q[..., :nope], up[..., :nope]), q_rope], axis=-1
            )
            out, cache = attend(cache, data.number, q, k, k[..., :0], shared.step)
            out = jnp.einsum("bthr,rhv->bthv", out, up[..., nope:])
        joined = out.reshape(*hidden.shape[:-1], -1)
        outwards = self._projection(
            "o_proj", joined.shape[-1], hidden.shape[-1], self.switches.o_bias
        )
        return project(joined, [outwards], data.layer, self.dtype, kernels)[0], cache

    def _queries(self, hidden: jax.Array, data: LayerData, kernels: Any) -> jax.Array:
        """Queries of all heads side by side, directly or through their own latent."""
        sizes, width = self._sizes, hidden.shape[-1]
        per_head = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
        features = self.config.num_attention_heads * per_head
        if sizes.q_lora_rank is None:
            projection = [self._projection("q_proj", width, features)]
            return project(hidden, projection, data.layer, self.dtype, kernels)[0]
        down = self._projection("q_a_proj", width, sizes.q_lora_rank, self.switches.qkv_bias)
        latent = project(hidden, [down], data.layer, self.dtype, kernels)[0]
        latent = self._norm("q_a_layernorm")(latent, data.layer, kernels)
        up = [self._projection("q_b_proj", sizes.q_lora_rank, features)]
        return project(latent, up, data.layer, self.dtype, kernels)[0]

    def _embedded(self, x: jax.Array, data: LayerData, shared: SharedData) -> jax.Array:
        """`x [B, T, heads, qk_rope_head_dim]` with rotary embedding, half-rotation layout."""
        if self._sizes.rope_interleave:
            # of queries and keys alike: their products stay
            x = jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
        return apply_rope(x, shared.cos[data.rope], shared.sin[data.rope])
