"""Codecs that learn: what shape one head's array has, and the codec bound to the arrays of a
layer's heads.
"""

import dataclasses
from typing import Any

from jax import Array

from .coupled import Coupled
from .levels import Levels
from .low_rank import LowRank
from .outliers import Outliers


def learned_part(codec: Any) -> Coupled | Levels | None:
    """The codec that learns, also beneath what others keep beside it; None where nothing is
    learned.
    """
    if isinstance(codec, Outliers | LowRank):
        return learned_part(codec.codec)
    return codec if isinstance(codec, Coupled | Levels) else None


def table_shape(codec: Any, head_dim: int) -> tuple[int, ...] | None:
    """Shape of one head's learned array; None where nothing is learned."""
    part = learned_part(codec)
    return part and part.table_shape(head_dim)


def with_table(codec: Any, table: Array | None) -> Any:
    """The codec with the arrays `[B, *table_shape]` of `B` heads; as it is where nothing is
    learned.
    """
    if table is None:
        return codec
    if isinstance(codec, Outliers | LowRank):
        return dataclasses.replace(codec, codec=with_table(codec.codec, table))
    return dataclasses.replace(codec, table=table)
