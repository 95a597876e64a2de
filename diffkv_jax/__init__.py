"""KV-cache compression for language models in JAX: DiffKV tiers in one paged, immutable cache."""

from diffkv_jax.cache import CacheSpec as CacheSpec
from diffkv_jax.cache import KVCache as KVCache
from diffkv_jax.generate import GenerateOutput as GenerateOutput
from diffkv_jax.generate import generate as generate
from diffkv_jax.generate import make_cache as make_cache
from diffkv_jax.methods import ada_kv as ada_kv
from diffkv_jax.methods import diffkv as diffkv
from diffkv_jax.methods import h2o as h2o
from diffkv_jax.methods import key_difference as key_difference
from diffkv_jax.methods import key_norm as key_norm
from diffkv_jax.methods import kivi as kivi
from diffkv_jax.methods import load_policy as load_policy
from diffkv_jax.methods import pyramidkv as pyramidkv
from diffkv_jax.methods import quantized as quantized
from diffkv_jax.methods import random_eviction as random_eviction
from diffkv_jax.methods import snapkv as snapkv
from diffkv_jax.methods import streaming_llm as streaming_llm
from diffkv_jax.methods import tova as tova
from diffkv_jax.model_protocol import AttentionSpec as AttentionSpec
from diffkv_jax.model_protocol import CausalLM as CausalLM
from diffkv_jax.policy import CompressionPolicy as CompressionPolicy
from diffkv_jax.report import MemoryReport as MemoryReport
from diffkv_jax.report import memory_report as memory_report
from diffkv_jax.sampling import Greedy as Greedy
from diffkv_jax.sampling import Sample as Sample
