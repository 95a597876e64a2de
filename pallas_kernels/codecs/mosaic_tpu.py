"""Encoding and demotion of blocks on TPUs (Mosaic) in one pass. float16 passes as int16 bits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..dispatch import tpu_interpreter
from .blockwise import Meta, Parts, Planes, demote_block, encode_block, head_dim_of, parts_of
from .formats import Block, KVFormat
from .halves import half_to_float
from .tiles import Scalar

STEP_BYTES = 1 << 20  # of K and V that one grid step reads, in VMEM twice


@dataclass(frozen=True)
class Blocks:
    """How many blocks of T tokens one grid step handles."""

    blocks: int

    @staticmethod
    def choose(count: int, block_bytes: int) -> "Blocks":
        """The defaults for `count` blocks of `block_bytes` (K and V)."""
        return Blocks(max(1, min(count, STEP_BYTES // block_bytes)))


def encode(
    fmt: KVFormat,
    k: Array,
    v: Array,
    *,
    interpret: bool | Literal["checked"],
    blocks: Blocks | None = None,
) -> Block:
    """`encode` of api.py on TPUs."""
    head_dim = k.shape[1]
    return _call(partial(_encode, fmt=fmt), fmt, (k, v), head_dim, blocks, interpret, "encode")


def _encode(k_ref: Any, v_ref: Any, *refs: Any, fmt: KVFormat) -> None:
    """Encode blocks, K then V `[blocks, d, T]` to a `Block` of Refs (DiffKV, arXiv 2412.03131 sec.
    5.1); float16 is int16 in both.

    Reads 2 d values a token, writes `fmt.token_bytes(d)` bytes a token.
    """
    out, (key, value) = parts_of(fmt, refs), fmt.scalars()

    def one(i: Array, none: None) -> None:
        for codec, source, payload, meta in (
            (key, k_ref, out.k_payload, out.k_meta),
            (value, v_ref, out.v_payload, out.v_meta),
        ):
            x = source[i]
            x = (
                half_to_float(x.astype(jnp.int32))
                if x.dtype == jnp.int16
                else x.astype(jnp.float32)
            )
            _write(
                i,
                *encode_block(
                    codec,
                    x.shape[0],
                    lambda tile, x=x: x[tile.channel : tile.channel + tile.channels],
                ),
                payload,
                meta,
            )

    lax.fori_loop(0, k_ref.shape[0], one, None)


def demote(
    source: KVFormat,
    target: KVFormat,
    block: Block,
    *,
    interpret: bool | Literal["checked"],
    blocks: Blocks | None = None,
) -> Block:
    """`demote` of api.py on TPUs."""
    head_dim = head_dim_of(source.key, block.k_payload.shape[1])
    kernel = partial(_demote, source=source, target=target, head_dim=head_dim)
    operands = tuple(x for x in block if x.shape[1])
    return _call(kernel, target, operands, head_dim, blocks, interpret, "demote")


def _demote(*refs: Any, source: KVFormat, target: KVFormat, head_dim: int) -> None:
    """Requantise blocks: Refs `[blocks, rows, T]` of a `Block` of `source` (without empty
    metadata), then of `target`; metadata int16.

    Reads `source.token_bytes(d)` and writes `target.token_bytes(d)` bytes a token.
    """
    count = sum(1 + (codec.meta_rows > 0) for codec in (source.key, source.value))
    old, new = parts_of(source, refs[:count]), parts_of(target, refs[count:])

    def requantise(high: Scalar, low: Scalar, payload: Array, meta: Any) -> tuple[Planes, Meta]:
        return demote_block(
            high, low, head_dim, lambda row, n: payload[row : row + n], lambda row: meta[row]
        )

    k, v = zip(source.scalars(), target.scalars(), strict=True)

    def one(i: Array, none: None) -> None:
        read = Parts(*(None if ref is None else ref[i].astype(jnp.int32) for ref in old))
        _write(i, *requantise(*k, read.k_payload, read.k_meta), new.k_payload, new.k_meta)
        _write(i, *requantise(*v, read.v_payload, read.v_meta), new.v_payload, new.v_meta)

    lax.fori_loop(0, refs[0].shape[0], one, None)


def _write(i: Array, planes: Planes, metadata: Meta, payload: Any, meta: Any) -> None:
    """Store block `i`; rows are joined first: each Ref is written whole whatever its tiling."""
    payload[i] = _joined([planes[row] for row in sorted(planes)]).astype(jnp.uint8)
    if meta is not None:
        meta[i] = _joined([metadata[row][None, :] for row in sorted(metadata)]).astype(jnp.int16)


def _joined(rows: list) -> Array:
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=0)


def _call(
    kernel: Callable,
    fmt: KVFormat,
    operands: tuple,
    head_dim: int,
    blocks: Blocks | None,
    interpret,
    name: str,
) -> Block:
    """Run a kernel over `[count, rows, T]` operands to a block of `fmt`."""
    count, _, tokens = operands[0].shape
    rows = fmt.key.rows(head_dim), fmt.value.rows(head_dim)
    meta_rows = [n for n in (fmt.key.meta_rows, fmt.value.meta_rows) if n]
    shapes = [((count, n, tokens), jnp.uint8) for n in rows]
    shapes += [((count, n, tokens), jnp.int16) for n in meta_rows]
    if blocks is None:
        blocks = Blocks.choose(count, sum(x.shape[1] * tokens * x.dtype.itemsize for x in operands))

    def of_step(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((blocks.blocks, rows, tokens), lambda step: (step, 0, 0))

    written = count * tokens * fmt.token_bytes(head_dim)
    moved = sum(x.size * x.dtype.itemsize for x in operands) + written
    parts = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(count, blocks.blocks),),
        in_specs=[of_step(x.shape[1]) for x in operands],
        out_specs=[of_step(shape[1]) for shape, _ in shapes],
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=8 * count * tokens * head_dim, transcendentals=0, bytes_accessed=moved
        ),
        interpret=tpu_interpreter(interpret),
        name=name,
    )(*(lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.float16 else x for x in operands))
    return Block(*(_as_half(part, count, tokens) for part in parts_of(fmt, parts)))


def _as_half(part: Array | None, count: int, tokens: int) -> Array:
    if part is None:
        return jnp.zeros((count, 0, tokens), jnp.float16)
    return part if part.dtype == jnp.uint8 else lax.bitcast_convert_type(part, jnp.float16)
