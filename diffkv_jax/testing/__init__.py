"""What tests and benchmarks share: tiny models, the pool read back by plain NumPy, long texts.

Nothing in the library imports it, and it needs nothing that the library does not. The modules
`quantiser`, `stored_numbers`, `normal_levels` and `blocks` are references of the codecs, written
from their equations alone.
"""

from diffkv_jax.testing.random_pool import on_device, random_pool
from diffkv_jax.testing.readback import TierTokens, check_pool, held_tokens, read_tier
from diffkv_jax.testing.texts import TEXTS, load_text
from diffkv_jax.testing.tiny import prompt, tiny_latent_model, tiny_model

__all__ = [
    "TEXTS",
    "TierTokens",
    "check_pool",
    "held_tokens",
    "load_text",
    "on_device",
    "prompt",
    "random_pool",
    "read_tier",
    "tiny_latent_model",
    "tiny_model",
]
