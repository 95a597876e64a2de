"""A block's shared numbers kept in its rows of T lanes; blocks side by side taken apart."""

import jax.numpy as jnp
from jax import Array


def rows_for(numbers: int, tokens: int) -> int:
    """Rows of `tokens` lanes that so many numbers of a block take."""
    return -(-numbers // tokens)


def as_rows(numbers: Array, tokens: int) -> Array:
    """`[..., a, b]` as rows `[..., rows_for(a * b), tokens]`, zeros behind them."""
    flat = numbers.reshape(*numbers.shape[:-2], -1)
    rows = rows_for(flat.shape[-1], tokens)
    padded = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, rows * tokens - flat.shape[-1])])
    return padded.reshape(*flat.shape[:-1], rows, tokens)


def from_rows(rows: Array, a: int, b: int) -> Array:
    """Inverse of `as_rows`."""
    flat = rows.reshape(*rows.shape[:-2], -1)
    return flat[..., : a * b].reshape(*flat.shape[:-1], a, b)


def apart(x: Array, tokens: int) -> Array:
    """n blocks side by side `[..., rows, n * tokens]` as `[..., n, rows, tokens]`."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, tokens), -2, -3)


def side_by_side(x: Array) -> Array:
    """Inverse of `apart`."""
    moved = jnp.moveaxis(x, -3, -2)
    return moved.reshape(*moved.shape[:-2], -1)
