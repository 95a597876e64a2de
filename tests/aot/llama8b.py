"""Shapes of Llama-3-8B with a compressed cache: 16 requests of 8k tokens. Shapes only: nothing is
allocated.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct as Shape

from diffkv_jax import CompressionPolicy, diffkv
from diffkv_jax.cache.cache import KVCache, empty_cache
from diffkv_jax.cache.pool_size import bound
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.models import ModelConfig, build_model
from diffkv_jax.pallas_kernels.apply_event import FreeRing, Stored
from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.decode_attention import Heads
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.pallas_kernels.plan_event import Moves, Rule

REQUESTS, LAYERS, KV_HEADS, GROUP, HEAD_DIM, CONTEXT, SLOTS, FLUSH = 16, 32, 8, 4, 128, 8192, 96, 32
HEADS = REQUESTS * KV_HEADS
PAGES_IN_USE = 0.75  # of what every token in the highest tier would take


def int32(*shape: int) -> Shape:
    return Shape(shape, jnp.int32)


def layout(
    kernels: Kernels,
    formats=("K8V4", "K4V2"),
    head_dim: int = HEAD_DIM,
    over="max",
    rope: bool = False,
) -> PageLayout:
    """The pages of the cache as the kernels want them; with `rope` keys are stored without their
    rotary embedding.
    """
    options = dict(
        tokens=kernels.tokens_per_block, max_len=CONTEXT, meta_dtype=kernels.meta_dtype, group=over
    )
    options |= (
        dict(rope=tuple(10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2)))
        if rope
        else {}
    )
    return PageLayout.solve(tuple(map(KVFormat.parse, formats)), head_dim, **options)


def pool(of: PageLayout, heads: int = LAYERS * HEADS) -> Pages:
    """A pool for `heads` heads of 8k tokens."""
    pages = int(heads * of.pages_for(0, CONTEXT) * PAGES_IN_USE)
    if of.rows * of.tokens * pages < 2**32:  # between 2 and 4 GiB Triton cannot address a payload
        pages //= 2
    return jax.eval_shape(partial(Pages.zeros, of, pages))


def max_pages(of: PageLayout) -> int:
    return of.pages_for(0, CONTEXT) + of.tiers


def heads(of: PageLayout) -> Heads:
    """What attention reads of one layer."""
    window = Shape((LAYERS, HEADS, SLOTS, of.head_dim), jnp.bfloat16)

    def table(codec) -> Shape | None:
        shape = codec.table_shape(of.head_dim)
        return None if shape is None else Shape((LAYERS, KV_HEADS, *shape), jnp.float16)

    tables = tuple((table(fmt.key), table(fmt.value)) for fmt in of.formats)
    return Heads(
        int32(HEADS, max_pages(of)),
        int32(HEADS, of.tiers),
        window,
        window,
        int32(HEADS),
        int32(),
        tables,
    )


def stored(of: PageLayout, count: int) -> Stored:
    """The stored tokens of `count` heads."""
    pages = pool(of)
    ring = jax.eval_shape(lambda: FreeRing.full(pages.num_pages))
    return Stored(pages, ring, int32(count, max_pages(of)), int32(count, of.tiers))


def rule(of: PageLayout, count: int) -> Rule:
    flags = partial(Shape, dtype=bool)
    return Rule(
        Shape((count, 2), jnp.float32),
        int32(count, 8, 2),
        flags((count,)),
        flags((count, of.tiers)),
    )


def moves(of: PageLayout, count: int) -> Moves:
    return Moves(int32(count, of.tiers), int32(count), int32(count, of.tiers))


def model(layers: int = LAYERS):
    """The model and its parameters' shapes, bfloat16."""
    config = ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=KV_HEADS * GROUP,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    built = build_model(config, "bfloat16")
    params = jax.eval_shape(
        built.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    return built, jax.tree.map(lambda x: Shape(x.shape, jnp.bfloat16), params)


def cache(
    built, kernels: Kernels, requests: int = REQUESTS, policy: CompressionPolicy | None = None
) -> KVCache:
    """The shapes of a cache of `built`, DiffKV's where no policy is given."""
    policy = policy or diffkv(alpha_high=1.0, alpha_low=0.02)
    options = dict(
        num_requests=requests, max_len=CONTEXT, num_pages=0, dtype="bfloat16", kernels=kernels
    )
    spec = CacheSpec.build(built.attention, policy, **options)
    layers = len(spec.paged_layers)
    spec = dataclasses.replace(spec, num_pages=pool(spec.layout, layers * spec.num_heads).num_pages)
    return jax.eval_shape(partial(empty_cache, spec), bound(spec, policy))
