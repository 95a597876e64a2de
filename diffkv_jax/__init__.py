"""KV-cache compression for language models in JAX: DiffKV tiers in one paged, immutable cache."""

from diffkv_jax.cache import CacheSpec as CacheSpec
from diffkv_jax.cache import KVCache as KVCache
from diffkv_jax.generate import GenerateOutput as GenerateOutput
from diffkv_jax.generate import generate as generate
from diffkv_jax.generate import make_cache as make_cache
from diffkv_jax.model_protocol import AttentionSpec as AttentionSpec
from diffkv_jax.model_protocol import CausalLM as CausalLM
from diffkv_jax.policy import CompressionPolicy as CompressionPolicy
from diffkv_jax.policy import diffkv as diffkv
from diffkv_jax.policy import load_policy as load_policy
from diffkv_jax.policy import quantized as quantized
from diffkv_jax.report import MemoryReport as MemoryReport
from diffkv_jax.report import memory_report as memory_report
from diffkv_jax.sampling import Greedy as Greedy
from diffkv_jax.sampling import Sample as Sample
