"""The parts of a decoder layer, as Flax Linen modules: norm, embedding, MLP and the logits head.

Parameters carry Hugging Face's names; a projection is "kernel" [in, out] (the transpose of torch's), a norm "weight".
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATION: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis, in float32 (arXiv:1910.07467).

    Attributes:
        eps: added to the mean square.
        adds_one: multiply by (1 + weight) instead, as Gemma does.
        param_dtype: the weight's dtype; the output has x's.
    """

    eps: float
    adds_one: bool
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initial = nn.initializers.zeros if self.adds_one else nn.initializers.ones
        weight = self.param("weight", initial, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        exact = x.astype(jnp.float32)
        normed = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + self.eps)
        return (normed * (1.0 + weight if self.adds_one else weight)).astype(x.dtype)


class Embedding(nn.Module):
    """The token table "embedding" [vocab_size, hidden_size], read as input and, where tied, as the logits head."""

    vocab_size: int
    hidden_size: int
    dtype: str
    param_dtype: str

    def setup(self) -> None:
        shape = (self.vocab_size, self.hidden_size)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape, self.param_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Rows of the table for tokens [B, T]: dtype [B, T, hidden_size]; NaN for an id that is not in the vocabulary."""
        return jnp.take(self.embedding, tokens, axis=0, mode="fill", fill_value=jnp.nan).astype(self.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [B, T, hidden_size] against every row: float32 [B, T, vocab_size]."""
        table = self.embedding.astype(self.dtype)
        return jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)


class LogitsHead(nn.Module):
    """The untied logits head "kernel" [hidden_size, vocab_size]; float32 out of matrix products in `dtype`."""

    vocab_size: int
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        shape = (hidden.shape[-1], self.vocab_size)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype).astype(self.dtype)
        return jnp.einsum("btd,dv->btv", hidden, kernel, preferred_element_type=jnp.float32)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202)."""

    intermediate_size: int
    hidden_act: str
    use_bias: bool
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def project(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=self.use_bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        gate = project(self.intermediate_size, "gate_proj")(x)
        up = project(self.intermediate_size, "up_proj")(x)
        return project(x.shape[-1], "down_proj")(ACTIVATION[self.hidden_act](gate) * up)
