"""New tokens into the recent window, old ones out of it."""

from .api import append_recent as append_recent
from .api import shift_recent as shift_recent
