"""Encoding and demotion of blocks on the CPU: the native kernels of cpu.cc."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..native import build
from .blockwise import head_dim_of
from .formats import Block, KVFormat, native_formats

LANES = 16  # tokens that the kernels handle side by side


def encode(fmt: KVFormat, k: Array, v: Array) -> Block:
    """`encode` of api.py.

    Raises:
        ValueError: T is no multiple of 16.
    """
    count, head_dim, tokens = k.shape
    run = build.call("codecs", "encode_cpu", *_shapes(fmt, count, head_dim, tokens))
    return Block(*run(k, v, formats=_codes(head_dim, tokens, fmt)))


def demote(source: KVFormat, target: KVFormat, block: Block) -> Block:
    """`demote` of api.py.

    Raises:
        ValueError: T is no multiple of 16.
    """
    count, rows, tokens = block.k_payload.shape
    head_dim = head_dim_of(source.key, rows)
    run = build.call("codecs", "demote_cpu", *_shapes(target, count, head_dim, tokens))
    return Block(
        *run(*block, formats=_codes(head_dim, tokens, source, target), head_dim=np.int64(head_dim))
    )


def _shapes(fmt: KVFormat, count: int, head_dim: int, tokens: int) -> list[jax.ShapeDtypeStruct]:
    """The shapes of `count` blocks of a format."""
    if tokens % LANES:
        raise ValueError(
            f"tokens a block={tokens} must be a multiple of {LANES} for the CPU's kernels; use "
            "implementation='xla'"
        )
    codecs = fmt.key, fmt.value
    payloads = [
        jax.ShapeDtypeStruct((count, codec.rows(head_dim), tokens), jnp.uint8) for codec in codecs
    ]
    metas = [
        jax.ShapeDtypeStruct((count, codec.meta_rows, tokens), jnp.float16) for codec in codecs
    ]
    return payloads + metas


def _codes(head_dim: int, tokens: int, *formats: KVFormat) -> np.ndarray:
    """The codecs of formats as the kernels read them."""
    of_blocks = [fmt.for_block(head_dim, tokens) for fmt in formats]
    return native_formats(of_blocks, [1] * len(formats))
