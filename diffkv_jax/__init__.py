"""KV-cache compression for language models in JAX: DiffKV tiers in one paged, immutable cache."""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

# `diffkv --help` waits for no JAX: the console script gets the public names with the first of them
_console_script = PurePath((sys.argv or [""])[0]).name in ("diffkv", "diffkv.exe")

if TYPE_CHECKING or not _console_script:
    from diffkv_jax.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        public = vars(import_module("diffkv_jax.public"))
        found = {key: value for key, value in public.items() if not key.startswith("_")}
        globals().update(found)
        if name not in found:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return found[name]
