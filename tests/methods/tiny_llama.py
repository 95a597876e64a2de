"""The same tiny Llama in torch and here, for what kvpress keeps of it."""

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

import diffkv_jax as dkv
from diffkv_jax.make_cache import make_cache
from diffkv_jax.models import load_pretrained
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.read_prompts import prefill
from diffkv_jax.testing.readback import check_pool, held_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH, LAYERS = 300, 4
PROMPT = np.random.default_rng(5).integers(0, 97, LENGTH)


@lru_cache
def models(kv_heads: int, attention: str = "sdpa"):
    """The same tiny Llama in torch (which presses may want with "eager" attention, one that is for
    them alone) and here, its attention peaked.
    """
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.1,
        attn_implementation=attention,
    )
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(config).eval()
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, params, _ = load_pretrained(Path(folder), dtype="float32")
    return theirs, ours, params


def kept(
    policy: dkv.CompressionPolicy,
    kv_heads: int = 2,
    chunk: int = 512,
    kernels: Kernels | None = None,
) -> list[list[set[int]]]:
    """Positions that every head of every layer holds after the prompt."""
    _, model, params = models(kv_heads)
    cache = make_cache(model, policy, [LENGTH], kernels=kernels or Kernels("xla"))
    _, cache = prefill(model, params, cache, PROMPT[None], np.array([LENGTH]), chunk)
    check_pool(cache.spec.layout, cache.stored.page_table, cache.stored.tier_len, cache.stored.ring)
    return [
        [set(held_tokens(cache, layer, 0, head)) for head in range(kv_heads)]
        for layer in range(LAYERS)
    ]


def half(_: int) -> int:
    return LENGTH // 2
