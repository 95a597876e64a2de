"""Attention of a prompt chunk, and the significance it gives."""

from .api import (
    COLUMN_SUMS as COLUMN_SUMS,
    PREFILL_ATTENTION as PREFILL_ATTENTION,
    column_sums as column_sums,
    prefill_attention as prefill_attention,
)
from .reference import Chunk as Chunk, Scale as Scale
from .sums_reference import ColumnSums as ColumnSums
