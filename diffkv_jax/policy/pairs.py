"""`LayerPairs`: which layers keep one direction for two (MiniCache, arXiv:2405.14366;
docs/design.md 11).
"""

from functools import partial
from math import ceil

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.arguments import number
from diffkv_jax.model import AttentionSpec
from diffkv_jax.policy.stage import Stage, static


def _share(name: str, value):
    return partial(number, least=0, most=1)(f"pairs.{name}", value)


class LayerPairs(Stage):
    """Layers from the middle on are merged in pairs of neighbours.

    Attributes:
        start: share of the layers, from the first, that are left as they are; an odd one out is
            left too.
        t: where on the arc from the first layer's direction to the second's the common one lies,
            from 0 to 1.
        retention: share of the tokens that both layers keep as they are: those whose directions
            differ most.

    Raises:
        ValueError: one of them is not a number from 0 to 1.
    """

    start: float = static(default=0.5, convert=_share)
    t: float = static(default=0.6, convert=_share)
    retention: float = static(default=0.05, convert=_share)

    def count(self, attention: AttentionSpec) -> int:
        """How many pairs there are: the last layers of the model.

        Raises:
            ValueError: too few layers, or a pair would not be neighbours with global attention.
        """
        if attention.latent is not None:
            raise ValueError(
                "pairs are made for keys and values, and this model has one latent for both: "
                "leave pairs out"
            )
        layers = attention.num_layers
        pairs = (layers - ceil(self.start * layers - 1e-9)) // 2
        if pairs == 0 and self.start < 1:
            raise ValueError(
                f"pairs.start={self.start} leaves no two of {layers} layers to merge: lower it, "
                "or take start=1.0 to merge none"
            )
        first = layers - 2 * pairs
        if any(window is not None for window in attention.sliding_windows[first:]):
            raise ValueError(
                f"pairs.start={self.start} merges layers {first} to {layers - 1} in pairs, and "
                "some of them have a sliding window, whose tokens are never compressed: raise "
                "start or leave pairs out"
            )
        return pairs

    def retained(self, tokens: Array | np.ndarray) -> Array:
        """How many of `tokens` (ints) that a pair of heads has stored stay unmerged, int32."""
        share = jnp.asarray(tokens, jnp.float32) * jnp.float32(self.retention)
        return jnp.ceil(share).astype(jnp.int32)
