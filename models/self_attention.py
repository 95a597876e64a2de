"""Self-attention of a decoder layer: projections, q/k norm, RoPE, plain attention or a cache's."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from diffkv_jax.steps.attend import attend, kernels_of

from .config import ModelConfig
from .layers import Projection, RMSNorm, project
from .plain_attention import plain_attention
from .rope import apply_rope
from .switches import Switches


class LayerData(NamedTuple):
    """What differs between layers, as data: int32 arrays with the layer axis in front, scanned over
    with the parameters.
    """

    layer: jax.Array
    """Its row in the stacked parameters."""
    number: jax.Array
    """The layer's index in the model, from 0."""
    window: jax.Array
    """Tokens that a query sees, `plain_attention.NO_WINDOW` = all."""
    rope: jax.Array
    """The row of the rope tables to use."""


class SharedData(NamedTuple):
    """What all layers of one call share."""

    positions: jax.Array
    """int32 [B, T]; -1 marks a padded row."""
    cos: jax.Array
    """float32 [R, B, T, head_dim / 2], R rope tables."""
    sin: jax.Array
    """As `cos`."""
    step: Any
    """Handed to `diffkv_jax.steps.attend.attend` as it came."""


def score_scale(config: ModelConfig) -> float:
    """The factor on q . k before the softmax."""
    scale = float(config.query_pre_attn_scalar or config.head_dim) ** -0.5
    if config.latent is None or config.rope_scaling is None:
        return scale
    return scale * config.rope_scaling.latent_scale


class SelfAttention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) over the given tokens, or over a cache."""

    config: ModelConfig
    switches: Switches
    dtype: str
    param_dtype: str

    def _projection(self, name: str, inputs: int, features: int, use_bias: bool) -> Projection:
        return Projection(
            self.config.num_hidden_layers, inputs, features, use_bias, self.param_dtype, name=name
        )

    def _norm(self, name: str) -> RMSNorm:
        config = self.config
        return RMSNorm(
            config.rms_norm_eps,
            self.switches.norm_adds_one,
            self.param_dtype,
            config.num_hidden_layers,
            name=name,
        )

    @nn.compact
    def __call__(
        self, hidden: jax.Array, cache: Any, data: LayerData, shared: SharedData
    ) -> tuple[jax.Array, Any]:
        """hidden [B, T, hidden_size] -> the same shape, and the cache."""
        config, kernels, width = self.config, kernels_of(cache), hidden.shape[-1]
        heads = {
            "q_proj": config.num_attention_heads,
            "k_proj": config.num_key_value_heads,
            "v_proj": config.num_key_value_heads,
        }
        inwards = [
            self._projection(name, width, n * config.head_dim, self.switches.qkv_bias)
            for name, n in heads.items()
        ]
        flat = project(hidden, inwards, data.layer, self.dtype, kernels)
        q, k, v = (x.reshape(*x.shape[:-1], -1, config.head_dim) for x in flat)
        if self.switches.qk_norm:
            q, k = (
                self._norm(name)(x, data.layer, kernels)
                for name, x in (("q_norm", q), ("k_norm", k))
            )
        cos, sin = shared.cos[data.rope], shared.sin[data.rope]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out, cache = self._attend(q, k, v, cache, data, shared)
        joined = out.reshape(*out.shape[:-2], config.num_attention_heads * config.head_dim)
        outwards = self._projection("o_proj", joined.shape[-1], width, self.switches.o_bias)
        return project(joined, [outwards], data.layer, self.dtype, kernels)[0], cache

    def _attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        cache: Any,
        data: LayerData,
        shared: SharedData,
    ) -> tuple[jax.Array, Any]:
        if cache is None:
            cap, scale = self.config.attn_logit_softcapping, score_scale(self.config)
            return plain_attention(
                q, k, v, shared.positions, data.window, sm_scale=scale, logits_soft_cap=cap
            ), None
        return attend(cache, data.number, q, k, v, shared.step)
