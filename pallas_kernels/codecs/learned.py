"""Codecs that learn: what shape one head's array has, and the codec bound to the arrays of a layer's heads."""

import dataclasses
from typing import Any

from jax import Array

from .coupled import Coupled
from .levels import Levels
from .outliers import Outliers


def learned_part(codec: Any) -> Coupled | Levels | None:
    """The codec that learns, also beneath outliers kept apart; None where nothing is learned."""
    inner = codec.codec if isinstance(codec, Outliers) else codec
    return inner if isinstance(inner, Coupled | Levels) else None


def table_shape(codec: Any, head_dim: int) -> tuple[int, ...] | None:
    """Shape of one head's learned array; None where nothing is learned."""
    part = learned_part(codec)
    return part and part.table_shape(head_dim)


def with_table(codec: Any, table: Array | None) -> Any:
    """The codec with the arrays `[B, *table_shape]` of `B` heads; as it is where nothing is learned."""
    if table is None:
        return codec
    if isinstance(codec, Outliers):
        return dataclasses.replace(codec, codec=with_table(codec.codec, table))
    return dataclasses.replace(codec, table=table)
