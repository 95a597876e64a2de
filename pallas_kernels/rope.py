"""Rotary embedding, half-rotation layout: channel c pairs with c + d/2 (arXiv:2104.09864)."""

import jax.numpy as jnp
from jax import Array


def turned(first: Array, second: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """Pairs of channels turned by an angle."""
    return first * cos - second * sin, second * cos + first * sin


def turn_pairs(x: Array, cos: Array, sin: Array) -> Array:
    """`x [..., d]` turned by the angles of `cos`, `sin [..., d / 2]` in float32, in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(turned(first, second, cos, sin), axis=-1).astype(x.dtype)


def at_positions(
    x: Array, position: Array, frequencies: tuple[float, ...], *, back: bool = False
) -> Array:
    """`x [..., n, d]` embedded at `position` int `[..., n]`, or freed of the embedding;
    `frequencies` are d / 2 radians a token.
    """
    angle = position.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return turn_pairs(x, jnp.cos(angle), jnp.sin(angle) * (-1 if back else 1))
