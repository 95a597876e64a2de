"""Encoding and demotion of blocks on GPUs (Triton), one pass over the data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from .blockwise import Meta, Planes, demote_block, encode_block, head_dim_of, parts_of
from .formats import Block, KVFormat
from .scales import as_half
from .tiles import Scalar


@dataclass(frozen=True)
class Blocks:
    """A program: all channels of `tokens` (a power of two that divides T) tokens of one block."""

    tokens: int
    warps: int

    @staticmethod
    def choose(head_dim: int, tokens: int) -> "Blocks":
        """The defaults: 32 bytes of a payload row, at most 32 values a thread."""
        tokens = min(32, tokens)
        return Blocks(tokens, max(1, min(8, head_dim * tokens // 2**10)))


def encode(
    fmt: KVFormat,
    k: Array,
    v: Array,
    *,
    interpret: bool | Literal["checked"],
    blocks: Blocks | None = None,
) -> Block:
    """`encode` of api.py on GPUs.

    Raises:
        ValueError: T or the channels of a tile are no power of two.
    """
    _check_powers_of_two(k.shape, *((codec,) for codec in fmt.scalars()))
    blocks = Blocks.choose(*k.shape[1:]) if blocks is None else blocks
    return _call(partial(_encode, fmt=fmt), fmt, (k, v), blocks, interpret, "encode")


def _encode(k_ref: Any, v_ref: Any, *refs: Any, fmt: KVFormat) -> None:
    """Encode some tokens of one block, K then V `[d, tokens]` to a `Block` of Refs (DiffKV, arXiv
    2412.03131 sec. 5.1).

    Reads 2 d values a token, writes `fmt.token_bytes(d)` bytes a token.
    """
    out = parts_of(fmt, refs)
    key, value = fmt.scalars()
    k, v = (key, k_ref, out.k_payload, out.k_meta), (value, v_ref, out.v_payload, out.v_meta)
    for codec, values, payload, meta in (k, v):
        _write(*encode_block(codec, values.shape[0], _tile_of(values)), payload, meta)


def _tile_of(values: Any) -> Callable:
    return lambda tile: values[tile.channel : tile.channel + tile.channels, :].astype(jnp.float32)


def demote(
    source: KVFormat,
    target: KVFormat,
    block: Block,
    *,
    interpret: bool | Literal["checked"],
    blocks: Blocks | None = None,
) -> Block:
    """`demote` of api.py on GPUs.

    Raises:
        ValueError: T or the channels of a tile are no power of two.
    """
    count, rows, tokens = block.k_payload.shape
    head_dim = head_dim_of(source.key, rows)
    pairs = zip(source.scalars(), target.scalars(), strict=True)
    _check_powers_of_two((count, head_dim, tokens), *pairs)
    blocks = Blocks.choose(head_dim, tokens) if blocks is None else blocks
    kernel = partial(_demote, source=source, target=target, head_dim=head_dim)
    operands = tuple(x for x in block if x.shape[1])
    return _call(kernel, target, operands, blocks, interpret, "demote", head_dim)


def _demote(*refs: Any, source: KVFormat, target: KVFormat, head_dim: int) -> None:
    """Requantise some tokens of one block: Refs of a `Block` of `source` (without empty metadata),
    then of `target`.

    Reads `source.token_bytes(d)` and writes `target.token_bytes(d)` bytes a token.
    """
    count = sum(1 + (codec.meta_rows > 0) for codec in (source.key, source.value))
    old, new = parts_of(source, refs[:count]), parts_of(target, refs[count:])

    def requantise(high: Scalar, low: Scalar, payload: Any, meta: Any) -> tuple[Planes, Meta]:
        return demote_block(
            high,
            low,
            head_dim,
            lambda row, channels: payload[row : row + channels, :].astype(jnp.int32),
            lambda row: meta[row, :],
        )

    k, v = zip(source.scalars(), target.scalars(), strict=True)
    _write(*requantise(*k, old.k_payload, old.k_meta), new.k_payload, new.k_meta)
    _write(*requantise(*v, old.v_payload, old.v_meta), new.v_payload, new.v_meta)


def _write(planes: Planes, metadata: Meta, payload: Any, meta: Any) -> None:
    for row, plane in planes.items():
        payload[row : row + plane.shape[0], :] = plane.astype(jnp.uint8)
    for row, value in metadata.items():
        meta[row, :] = as_half(value)


def _call(
    kernel: Callable,
    fmt: KVFormat,
    operands: tuple,
    blocks: Blocks,
    interpret,
    name: str,
    head_dim: int | None = None,
) -> Block:
    """Run a kernel over `[count, rows, T]` operands to a block of `fmt`, a program a part."""
    count, first_rows, tokens = operands[0].shape
    head_dim = first_rows if head_dim is None else head_dim
    rows = fmt.key.rows(head_dim), fmt.value.rows(head_dim)
    meta_rows = [n for n in (fmt.key.meta_rows, fmt.value.meta_rows) if n]
    shapes = [((count, n, tokens), jnp.uint8) for n in rows]
    shapes += [((count, n, tokens), jnp.float16) for n in meta_rows]

    def of_program(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, blocks.tokens), lambda block, piece: (block, 0, piece))

    parts = pl.pallas_call(
        kernel,
        grid=(count, tokens // blocks.tokens),
        in_specs=[of_program(x.shape[1]) for x in operands],
        out_specs=[of_program(shape[1]) for shape, _ in shapes],
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=1),
        interpret=bool(interpret),
        name=name,
    )(*operands)
    empty = jnp.zeros((count, 0, tokens), jnp.float16)
    return Block(*(empty if part is None else part for part in parts_of(fmt, parts)))


def _check_powers_of_two(shape: tuple[int, ...], *codecs: tuple[Scalar, ...]) -> None:
    _, head_dim, tokens = shape
    sizes = {tile.channels for first, *others in codecs for tile in first.tiles(head_dim, *others)}
    of_tiles = (("channels of a tile", size) for size in sorted(sizes))
    for name, size in [("tokens a block", tokens), *of_tiles]:
        if size & (size - 1):
            raise ValueError(
                f"{name}={size} (head_dim={head_dim}, {codecs}) must be a power of two for Triton; "
                "choose other groups or formats, or use implementation='xla'"
            )
