"""Published methods, one file each: its paper, its score or rule if it needs one, its constructor.

A new one is a file here and a line below; those whose arguments all have defaults are policies by
name (`load_policy`).
"""

import inspect as _inspect

from diffkv_jax.methods.ada_kv import ada_kv as ada_kv
from diffkv_jax.methods.coupled_quantization import coupled_quantization as coupled_quantization
from diffkv_jax.methods.diffkv import MeanAttention as MeanAttention, diffkv as diffkv
from diffkv_jax.methods.expected_attention import (
    ExpectedAttention as ExpectedAttention,
    expected_attention as expected_attention,
)
from diffkv_jax.methods.fastgen import HeadClasses as HeadClasses, fastgen as fastgen
from diffkv_jax.methods.gear import gear as gear
from diffkv_jax.methods.h2o import AttentionSum as AttentionSum, h2o as h2o
from diffkv_jax.methods.key_difference import (
    KeyDifference as KeyDifference,
    key_difference as key_difference,
)
from diffkv_jax.methods.key_norm import KeyNorm as KeyNorm, key_norm as key_norm
from diffkv_jax.methods.kivi import kivi as kivi
from diffkv_jax.methods.kvquant import kvquant as kvquant
from diffkv_jax.methods.kvzip import ContextReconstruction as ContextReconstruction, kvzip as kvzip
from diffkv_jax.methods.minicache import minicache as minicache
from diffkv_jax.methods.pyramidinfer import (
    PivotalContext as PivotalContext,
    pyramidinfer as pyramidinfer,
)
from diffkv_jax.methods.pyramidkv import pyramidkv as pyramidkv
from diffkv_jax.methods.quantized import quantized as quantized
from diffkv_jax.methods.random_eviction import (
    RandomScore as RandomScore,
    random_eviction as random_eviction,
)
from diffkv_jax.methods.snapkv import (
    LastQueries as LastQueries,
    WindowAttention as WindowAttention,
    snapkv as snapkv,
)
from diffkv_jax.methods.streaming_llm import Recency as Recency, streaming_llm as streaming_llm
from diffkv_jax.methods.tova import LastQuery as LastQuery, tova as tova
from diffkv_jax.methods.turboquant import turboquant as turboquant


def _has_defaults(value: object) -> bool:
    if not _inspect.isfunction(value) or not value.__module__.startswith(f"{__name__}."):
        return False
    parameters = _inspect.signature(value).parameters.values()
    return all(p.kind is p.VAR_KEYWORD or p.default is not p.empty for p in parameters)


_OWN = [name for name, value in vars().items() if callable(value) and name[0] != "_"]
__all__ = [*_OWN, "METHODS"]  # pyright: ignore[reportUnsupportedDunderAll]
METHODS = tuple(value for value in [*vars().values()] if _has_defaults(value))
