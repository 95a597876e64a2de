"""`Merge`: which layers keep one direction for two, as data (MiniCache, arXiv:2405.14366;
docs/design.md 11).
"""

from dataclasses import dataclass, fields
from math import ceil

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.arguments import number
from diffkv_jax.model import AttentionSpec


@dataclass(frozen=True)
class Merge:
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

    start: float = 0.5
    t: float = 0.6
    retention: float = 0.05

    def __post_init__(self):
        for field in fields(self):
            value = number(f"merge.{field.name}", getattr(self, field.name), least=0, most=1)
            object.__setattr__(self, field.name, value)

    def pairs(self, attention: AttentionSpec) -> int:
        """How many pairs there are: the last layers of the model.

        Raises:
            ValueError: too few layers, or a pair would not be neighbours with global attention.
        """
        if attention.latent is not None:
            raise ValueError(
                "merge is made for keys and values, and this model has one latent "
                "for both: leave merge out"
            )
        layers = attention.num_layers
        pairs = (layers - ceil(self.start * layers - 1e-9)) // 2
        if pairs == 0 and self.start < 1:
            raise ValueError(
                f"merge.start={self.start} leaves no two of {layers} layers to merge: lower it, "
                f"or take start=1.0 to merge none"
            )
        first = layers - 2 * pairs
        if any(window is not None for window in attention.sliding_windows[first:]):
            raise ValueError(
                f"merge.start={self.start} merges layers {first} to {layers - 1} in pairs, and "
                f"some of them have a sliding window, whose "
                "tokens are never compressed: raise start or leave merge out"
            )
        return pairs

    def retained(self, tokens: Array | np.ndarray) -> Array:
        """How many of `tokens` (ints) that a pair of heads has stored stay unmerged, int32."""
        return jnp.ceil(jnp.asarray(tokens, jnp.float32) * jnp.float32(self.retention)).astype(
            jnp.int32
        )
