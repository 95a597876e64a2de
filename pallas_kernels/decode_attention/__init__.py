"""Attention over paged, mixed-precision tiers."""

from .api import DECODE_ATTENTION as DECODE_ATTENTION
from .api import decode_attention as decode_attention
from .reference import Heads as Heads
from .reference import Sliding as Sliding
