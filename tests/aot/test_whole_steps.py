"""One whole decode step and one whole prompt chunk of Llama-3-8B with a DiffKV cache, compiled for
real chips: nothing copies the pool.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import llama8b
import pytest
from jax import ShapeDtypeStruct as Shape

from benchmarks.roofline import chips
from benchmarks.roofline.chips import Compiled, compile_for
from diffkv_jax import CompressionPolicy, kvquant
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import Pages
from diffkv_jax.steps.jitted import decode_step, prefill_chunk

pytestmark = pytest.mark.compile

KERNELS = {"cuda": Kernels("triton"), "tpu": Kernels("mosaic_tpu")}
CHUNK = 1024
# layers where the whole model does not fit the chip's memory; the programs are the same but for the
# loop's end
FITS = {"v5e": 16}


def compiled(
    chip: chips.Chip, step: str, policy: CompressionPolicy | None = None
) -> tuple[Compiled, Pages]:
    """The compiled step and the shapes of the pool."""
    model, params = llama8b.model(FITS.get(chip.name, llama8b.LAYERS))
    cache = llama8b.cache(model, KERNELS[chip.platform], policy=policy)
    requests = cache.spec.num_requests
    ints, flags = partial(Shape, dtype=jnp.int32), partial(Shape, dtype=bool)

    def decode(params, cache, token, active):
        return decode_step(model, params, cache, token, active)

    def prefill(params, cache, tokens, length, last):
        return prefill_chunk.__wrapped__(model, params, cache, tokens, length, last)

    if step == "decode":
        program = compile_for(
            chip, decode, params, cache, ints((requests,)), flags((requests,)), donate=(1,)
        )
    else:
        program = compile_for(
            chip,
            prefill,
            params,
            cache,
            ints((requests, CHUNK)),
            ints((requests,)),
            flags(()),
            donate=(1,),
        )
    return program, cache.stored.pages


def pool_copies(program: Compiled, shapes: list[tuple[int, ...]], *, plain_xla: bool) -> list[str]:
    """Instructions of the optimised HLO that copy, transpose or fuse something of the shape of an
    array of the pool.

    Plain XLA's fusions that scatter into the pool are no copies: copies stand before them. Nor is
    one that updates a slice of the scores where it lies, when old queries are forgotten.
    """
    kinds = "copy|transpose|copy-start" if plain_xla else "copy|transpose|fusion|copy-start"
    patterns = [
        rf"= \(?\w+\[{','.join(map(str, shape))}\]\S* (?:{kinds})\("
        for shape in shapes
        if 0 not in shape
    ]
    return [
        line.strip()[:160]
        for line in program.hlo.splitlines()
        if any(re.search(pattern, line) for pattern in patterns)
        and not _updates_a_slice(program.hlo, line)
    ]


def _updates_a_slice(hlo: str, line: str) -> bool:
    """Whether a fusion's result is its operand with a slice written anew."""
    called = re.search(r"calls=(%[\w.\-]+)", line)
    if called is None:
        return False
    body = re.split(rf"\n{re.escape(called[1])} \(", hlo)[-1].partition("\n}")[0]
    return bool(re.search(r"ROOT \S+ = \S+ dynamic-update-slice\(", body))


@pytest.mark.parametrize(
    ("step", "policy"),
    [("decode", None), ("prefill", None), ("decode", kvquant(4))],
    ids=["decode", "prefill", "decode KVQuant"],
)
def test_pool_is_updated_in_place(chip: chips.Chip, step: str, policy: CompressionPolicy | None):
    """KVQuant's events are plain XLA, which encodes what enters a whole layer at once."""
    program, pages = compiled(chip, step, policy)
    arrays = jax.tree.leaves(pages)
    pool_bytes, memory = sum(x.size * x.dtype.itemsize for x in arrays), program.memory
    assert memory.alias_size_in_bytes > pool_bytes
    largest = LARGEST_TEMPORARY[step] * (1 if policy is None else 3)
    # so that none of it is a copy of the pool
    assert memory.temp_size_in_bytes < min(largest, pool_bytes)
    assert not pool_copies(program, [x.shape for x in arrays], plain_xla=policy is not None)
    for name, kernel in program.kernels.items():
        assert kernel.spill_stores <= MOST_SPILLED, (
            f"{name} spills {kernel.spill_stores} bytes a thread"
        )


LARGEST_TEMPORARY = {"decode": 256 << 20, "prefill": 2 << 30}
MOST_SPILLED = 64  # bytes a thread
