"""Attention of a prompt chunk, and the significance it gives."""

from .api import COLUMN_SUMS as COLUMN_SUMS
from .api import PREFILL_ATTENTION as PREFILL_ATTENTION
from .api import column_sums as column_sums
from .api import prefill_attention as prefill_attention
from .reference import Chunk as Chunk
from .reference import Scale as Scale
from .sums_reference import ColumnSums as ColumnSums
