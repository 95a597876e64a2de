"""Attention over paged, mixed-precision tiers."""

from .reference import Heads as Heads
from .reference import decode_attention as decode_attention
