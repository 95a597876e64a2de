"""Attention over paged, mixed-precision tiers."""

from .api import DECODE_ATTENTION as DECODE_ATTENTION, decode_attention as decode_attention
from .reference import Heads as Heads, Sliding as Sliding
