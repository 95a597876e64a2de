"""The parts of a decoder layer in Flax Linen: norm, projection, embedding, MLP, logits head.

Parameters carry Hugging Face's names; a projection is "kernel" [in, out] (the transpose of
torch's), a norm "weight". Those of the layers are stacked, and a layer picks its own by index when
it uses them: a slice cut off first would be a copy (docs/design.md 7).
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.linear import linear, sum_of_rows

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
        num_layers: of a stack "weight" [num_layers, features], then called with the layer's index;
            None for a single one.
    """

    eps: float
    adds_one: bool
    param_dtype: str
    num_layers: int | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, layer: jax.Array | None = None, kernels: Kernels = XLA
    ) -> jax.Array:
        initial = nn.initializers.zeros if self.adds_one else nn.initializers.ones
        stack = () if self.num_layers is None else (self.num_layers,)
        weight = self.param("weight", initial, (*stack, x.shape[-1]), self.param_dtype)
        weight = (weight if layer is None else weight[layer]).astype(jnp.float32)
        exact = x.astype(jnp.float32)
        mean_square = sum_of_rows(exact * exact, kernels=kernels) / x.shape[-1]
        normed = exact * jax.lax.rsqrt(mean_square + self.eps)
        return (normed * (1.0 + weight if self.adds_one else weight)).astype(x.dtype)


class Projection(nn.Module):
    """Weights of one projection in every layer: "kernel" [num_layers, inputs, features], and "bias"
    [num_layers, features] if `use_bias`.

    `project` applies several of them at once.
    """

    num_layers: int
    inputs: int
    features: int
    use_bias: bool
    param_dtype: str

    def setup(self) -> None:
        initial = nn.initializers.lecun_normal(batch_axis=(0,))
        self.kernel = self.param(
            "kernel", initial, (self.num_layers, self.inputs, self.features), self.param_dtype
        )
        shape = (self.num_layers, self.features)
        self.bias = (
            self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
            if self.use_bias
            else None
        )


def project(
    x: jax.Array, projections: Sequence[Projection], layer: jax.Array, dtype: str, kernels: Kernels
) -> list[jax.Array]:
    """x [..., inputs] through each projection of one layer: `dtype` [..., features]."""
    products = linear(x.astype(dtype), [p.kernel for p in projections], layer, kernels=kernels)
    return [
        y if p.bias is None else y + p.bias[layer].astype(dtype)
        for y, p in zip(products, projections, strict=True)
    ]


class Embedding(nn.Module):
    """The token table "embedding" [vocab_size, hidden_size], input and, if tied, logits head."""

    vocab_size: int
    hidden_size: int
    dtype: str
    param_dtype: str

    def setup(self) -> None:
        shape = (self.vocab_size, self.hidden_size)
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), shape, self.param_dtype
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Rows for tokens [B, T]: dtype [B, T, hidden_size]; NaN for ids beyond the vocabulary."""
        # the barrier keeps XLA from converting the whole table to float32 once before a decode loop
        table, tokens = jax.lax.optimization_barrier((self.embedding, tokens))
        return jnp.take(table, tokens, axis=0, mode="fill", fill_value=jnp.nan).astype(self.dtype)

    def logits(self, hidden: jax.Array, kernels: Kernels = XLA) -> jax.Array:
        """hidden [B, T, hidden_size] against every row: float32 [B, T, vocab_size]."""
        table = [self.embedding]
        return linear(hidden, table, transposed=True, dtype="float32", kernels=kernels)[0]


class LogitsHead(nn.Module):
    """The untied logits head "kernel" [hidden_size, vocab_size]; float32 from `dtype` products."""

    vocab_size: int
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, hidden: jax.Array, kernels: Kernels = XLA) -> jax.Array:
        shape, initial = (hidden.shape[-1], self.vocab_size), nn.initializers.lecun_normal()
        kernel = self.param("kernel", initial, shape, self.param_dtype)
        return linear(hidden, [kernel], dtype="float32", kernels=kernels)[0]


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (arXiv:2002.05202)."""

    num_layers: int
    intermediate_size: int
    hidden_act: str
    use_bias: bool
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, kernels: Kernels) -> jax.Array:
        def projection(name: str, inputs: int, features: int) -> Projection:
            return Projection(
                self.num_layers, inputs, features, self.use_bias, self.param_dtype, name=name
            )

        width, inner = x.shape[-1], self.intermediate_size
        inwards = [projection("gate_proj", width, inner), projection("up_proj", width, inner)]
        gate, up = project(x, inwards, layer, self.dtype, kernels)
        return project(
            ACTIVATION[self.hidden_act](gate) * up,
            [projection("down_proj", inner, width)],
            layer,
            self.dtype,
            kernels,
        )[0]
