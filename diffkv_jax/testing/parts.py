"""A cache, or any other tree of dataclasses and named tuples, with one part exchanged."""

import dataclasses
from typing import Any


def with_part(tree: Any, path: str, value: Any) -> Any:
    """`tree` with the part at `path`, such as "stored.ring.count" of a cache, replaced."""
    name, _, rest = path.partition(".")
    part = {name: with_part(getattr(tree, name), rest, value) if rest else value}
    return tree._replace(**part) if hasattr(tree, "_replace") else dataclasses.replace(tree, **part)
