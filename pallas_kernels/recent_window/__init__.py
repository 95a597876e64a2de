"""New tokens into the recent window, old ones out of it."""

from .api import (
    APPEND_RECENT as APPEND_RECENT,
    SHIFT_RECENT as SHIFT_RECENT,
    append_recent as append_recent,
    shift_recent as shift_recent,
)
