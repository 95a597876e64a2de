"""Attention of a prompt chunk, and the significance it gives."""

from .api import column_sums as column_sums
from .api import prefill_attention as prefill_attention
from .column_sums import ColumnSums as ColumnSums
from .reference import Chunk as Chunk
from .reference import Scale as Scale
