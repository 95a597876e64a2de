"""Attention of a prompt chunk, and the significance it gives."""

from .column_sums import ColumnSums as ColumnSums
from .column_sums import column_sums as column_sums
from .reference import Chunk as Chunk
from .reference import Scale as Scale
from .reference import prefill_attention as prefill_attention
