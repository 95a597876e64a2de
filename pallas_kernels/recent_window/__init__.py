"""New tokens into the recent window, old ones out of it."""

from .api import APPEND_RECENT as APPEND_RECENT
from .api import SHIFT_RECENT as SHIFT_RECENT
from .api import append_recent as append_recent
from .api import shift_recent as shift_recent
