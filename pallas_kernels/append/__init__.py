"""New tokens into the recent window."""

from .reference import append_recent as append_recent
