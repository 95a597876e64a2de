"""Self-attention of a decoder layer: projections, q/k norm and RoPE, then plain attention or the cache's."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax

from diffkv_jax.attend import attend

from .config import ModelConfig
from .layers import RMSNorm
from .plain_attention import plain_attention
from .rope import apply_rope
from .switches import Switches


class LayerData(NamedTuple):
    """What differs between layers, as data: int32 arrays with the layer axis in front, scanned over with the parameters."""

    layer: jax.Array
    """The layer's index, from 0."""
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
    """Handed to `diffkv_jax.attend.attend` as it came."""


def score_scale(config: ModelConfig) -> float:
    """The factor on q . k before the softmax."""
    return float(config.query_pre_attn_scalar or config.head_dim) ** -0.5


class SelfAttention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) over the given tokens, or over a cache that takes them in."""

    config: ModelConfig
    switches: Switches
    dtype: str
    param_dtype: str

    def _project(self, x: jax.Array, name: str, heads: int) -> jax.Array:
        """[B, T, in] to [B, T, heads, head_dim]."""
        width = heads * self.config.head_dim
        bias = self.switches.qkv_bias
        flat = nn.Dense(width, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)
        return flat.reshape(*flat.shape[:-1], heads, self.config.head_dim)

    @nn.compact
    def __call__(self, hidden: jax.Array, cache: Any, data: LayerData, shared: SharedData) -> tuple[jax.Array, Any]:
        """hidden [B, T, hidden_size] -> the same shape, and the cache."""
        config = self.config
        q = self._project(hidden, "q_proj", config.num_attention_heads)
        k = self._project(hidden, "k_proj", config.num_key_value_heads)
        v = self._project(hidden, "v_proj", config.num_key_value_heads)
        if self.switches.qk_norm:
            q = RMSNorm(config.rms_norm_eps, self.switches.norm_adds_one, self.param_dtype, name="q_norm")(q)
            k = RMSNorm(config.rms_norm_eps, self.switches.norm_adds_one, self.param_dtype, name="k_norm")(k)
        cos, sin = shared.cos[data.rope], shared.sin[data.rope]
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out, cache = self._attend(q, k, v, cache, data, shared)
        flat = out.reshape(*out.shape[:-2], config.num_attention_heads * config.head_dim)
        o_proj = nn.Dense(hidden.shape[-1], use_bias=self.switches.o_bias, dtype=self.dtype, param_dtype=self.param_dtype, name="o_proj")
        return o_proj(flat), cache

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, data: LayerData, shared: SharedData) -> tuple[jax.Array, Any]:
        if cache is None:
            cap, scale = self.config.attn_logit_softcapping, score_scale(self.config)
            return plain_attention(q, k, v, shared.positions, data.window, sm_scale=scale, logits_soft_cap=cap), None
        return attend(cache, data.layer, q, k, v, shared.positions, shared.step)
