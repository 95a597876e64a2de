"""A mixture of experts (DeepSeekMoE, arXiv:2401.06066): some for all tokens, a few picked."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.linear import linear

from .deepseek_config import ExpertSizes
from .layers import ACTIVATION, GatedMLP


class MixtureOfExperts(nn.Module):
    """What layers with experts have for an MLP; `use_bias` concerns the shared experts alone."""

    num_layers: int
    sizes: ExpertSizes
    hidden_act: str
    use_bias: bool
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array, layer: Array, kernels: Kernels) -> Array:
        """x [B, T, hidden_size] through the picked experts, one after the other, and the shared;
        what no token goes to is skipped.
        """
        sizes, width, inner = self.sizes, x.shape[-1], self.sizes.moe_intermediate_size
        weights = Router(self.num_layers, sizes, self.param_dtype, name="gate")(x, layer)
        stacks = Experts(
            self.num_layers, sizes.n_routed_experts, width, inner, self.param_dtype, name="experts"
        )()
        given = x.astype(self.dtype)

        def one(expert: Array, total: Array) -> Array:
            weight, row = weights[..., expert, None], layer * sizes.n_routed_experts + expert

            def run(total: Array) -> Array:
                gate, up = linear(given, stacks[:2], row, kernels=kernels)
                return (
                    total
                    + weight
                    * linear(
                        ACTIVATION[self.hidden_act](gate) * up, stacks[2:], row, kernels=kernels
                    )[0]
                )

            return lax.cond((weight > 0).any(), run, lambda total: total, total)

        routed = lax.fori_loop(
            0, sizes.n_routed_experts, one, jnp.zeros(x.shape, jnp.float32)
        ).astype(self.dtype)
        choices = (self.hidden_act, self.use_bias, self.dtype, self.param_dtype)
        return routed + GatedMLP(
            self.num_layers, sizes.n_shared_experts * inner, *choices, name="shared_experts"
        )(x, layer, kernels)


class Experts(nn.Module):
    """Weights of all routed experts in every layer, named as the MLP's, each "kernel" [num_layers,
    experts, inputs, features].
    """

    num_layers: int
    experts: int
    width: int
    inner: int
    param_dtype: str

    @nn.compact
    def __call__(self) -> list[Array]:
        """gate_proj, up_proj and down_proj, layers and experts on one axis."""
        shapes = {
            "gate_proj": (self.width, self.inner),
            "up_proj": (self.width, self.inner),
            "down_proj": (self.inner, self.width),
        }
        stacks = [
            ExpertStack((self.num_layers, self.experts, *shape), self.param_dtype, name=name)()
            for name, shape in shapes.items()
        ]
        return [stack.reshape(-1, *stack.shape[2:]) for stack in stacks]


class ExpertStack(nn.Module):
    """One "kernel" of a given shape."""

    shape: tuple[int, ...]
    param_dtype: str

    @nn.compact
    def __call__(self) -> Array:
        return self.param(
            "kernel", nn.initializers.lecun_normal(batch_axis=(0, 1)), self.shape, self.param_dtype
        )


class Router(nn.Module):
    """Which experts a token goes to, and with what weight; all in float32."""

    num_layers: int
    sizes: ExpertSizes
    param_dtype: str

    @nn.compact
    def __call__(self, x: Array, layer: Array) -> Array:
        """x [B, T, hidden_size] to float32 [B, T, n_routed_experts], 0 for unpicked experts."""
        sizes, count = self.sizes, self.sizes.n_routed_experts
        initial = nn.initializers.lecun_normal(batch_axis=(0,))
        kernel = self.param(
            "kernel", initial, (self.num_layers, x.shape[-1], count), self.param_dtype
        )[layer]
        logits = jnp.matmul(
            x.astype(jnp.float32), kernel.astype(jnp.float32), precision=lax.Precision.HIGHEST
        )
        if sizes.scoring == "softmax":
            scores = nn.softmax(logits)
            choice = scores
        else:
            scores = nn.sigmoid(logits)
            choice = (
                scores
                + self.param(
                    "e_score_correction_bias",
                    nn.initializers.zeros,
                    (self.num_layers, count),
                    "float32",
                )[layer]
            )
        if sizes.n_group is not None:
            choice = jnp.where(_in_best_groups(choice, sizes), choice, -jnp.inf)
        weights = jnp.where(_among_best(choice, sizes.num_experts_per_tok), scores, 0.0)
        if sizes.norm_topk_prob:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return weights * sizes.routed_scaling_factor


def _in_best_groups(choice: Array, sizes: ExpertSizes) -> Array:
    """Mask of the experts in the best groups; a group counts by its best expert (V2), or the sum of
    its two best (V3).
    """
    groups, taken = sizes.n_group or 1, sizes.topk_group or 1
    best = lax.top_k(
        choice.reshape(*choice.shape[:-1], groups, -1), 1 if sizes.scoring == "softmax" else 2
    )[0].sum(axis=-1)
    return jnp.repeat(_among_best(best, taken), choice.shape[-1] // groups, axis=-1)


def _among_best(scores: Array, count: int) -> Array:
    """Mask of the `count` largest of the last axis."""
    return jax.nn.one_hot(lax.top_k(scores, count)[1], scores.shape[-1], dtype=bool).any(axis=-2)
