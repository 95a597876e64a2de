"""Tokens into and out of tiers, in place; free pages as a ring on the device."""

from .api import APPLY_EVENT as APPLY_EVENT, apply_event as apply_event
from .columns import ranked as ranked
from .plan import pages_beyond as pages_beyond
from .reference import (
    Stored as Stored,
    Tokens as Tokens,
    append_tokens as append_tokens,
    release_all as release_all,
    remove_tokens as remove_tokens,
)
from .ring import FreeRing as FreeRing, allocate as allocate
