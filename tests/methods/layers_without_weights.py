"""A model that is nothing but attention: its parameters are q, k and v of every layer."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from diffkv_jax.model import AttentionSpec
from diffkv_jax.steps.attend import attend
from diffkv_jax.steps.jitted import decode_step

LAYERS, REQUESTS, Q_HEADS, KV_HEADS, DIM, CHUNK, WINDOW, FLUSH = 5, 2, 4, 2, 16, 32, 8, 4
FIRST = 3  # of 5 layers the last 2 are merged: half of them, and an odd one out stays as it is


def spec_of(
    layers: int = LAYERS, windows: tuple[int | None, ...] | None = None, dim: int = DIM
) -> AttentionSpec:
    windows = windows or (None,) * layers
    return AttentionSpec(
        len(windows), Q_HEADS, KV_HEADS, dim, windows, dim**-0.5, None, 97, 4096, "float32"
    )


@dataclass(frozen=True)
class Layers:
    """A model without weights: its parameters are q, k, v of every layer and its logits are what
    attention gives.
    """

    attention: AttentionSpec

    def apply(self, variables, tokens, positions, cache, step, last_only=False):
        """Outputs [R, 1, L, T, H, d]."""

        def layer(cache, inputs):
            out, cache = attend(cache, *inputs, step)
            return cache, out

        cache, outs = lax.scan(
            layer, cache, (jnp.arange(self.attention.num_layers), *variables["params"])
        )
        return jnp.moveaxis(outs, 0, 1)[:, None], cache


MODEL = Layers(spec_of())
decode = jax.jit(partial(decode_step, MODEL))


def draw(rng: np.random.Generator, tokens: int) -> list[np.ndarray]:
    """q, k, v float32 [L, R, tokens, heads, d]: neighbouring layers are alike, some tokens less
    than others, of different lengths.
    """

    def tensor(heads: int) -> np.ndarray:
        base, own = (
            rng.normal(size=(REQUESTS, tokens, heads, DIM)),
            rng.normal(size=(LAYERS, REQUESTS, tokens, heads, DIM)),
        )
        mix = rng.uniform(0.1, 1.2, size=(REQUESTS, tokens, heads, 1))
        return ((base + mix * own) * rng.uniform(0.5, 2.0, size=(LAYERS, 1, 1, heads, 1))).astype(
            np.float32
        )

    return [tensor(Q_HEADS), tensor(KV_HEADS), tensor(KV_HEADS)]
