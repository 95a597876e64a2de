"""The traffic counter on toy kernels whose bytes are counted by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu, triton as plgpu

from benchmarks.roofline.cases import MIXES, Model, Setting, decode_case
from benchmarks.roofline.traffic import count_traffic

HEADS, PAGES, ROWS, T = 3, 40, 16, 32
PAGE = ROWS * T  # bytes
F32 = jnp.float32
pool = jax.ShapeDtypeStruct((PAGES, ROWS, T), jnp.uint8)
LENGTHS = np.array([0, 33, 96], np.int32)  # tokens: 0, 2 and 3 pages
TABLE = np.full((HEADS, 4), 10**6, np.int32)  # rubbish where there is no page
TABLE[1, :2], TABLE[2, :3] = (7, 8), (39, 0, 3)


def triton_call(kernel, *operands, grid=(HEADS,), shape=(HEADS, ROWS), dtype=F32, **options):
    params = plgpu.CompilerParams(num_warps=1, num_stages=1)
    out = jax.ShapeDtypeStruct(shape, dtype)
    return pl.pallas_call(
        kernel, grid=grid, out_shape=out, compiler_params=params, name="toy", **options
    )(*operands)


def page_sums(table, length, pool, out, *, reads):
    """Sums of the pages of a head, read in `reads` loops one after another; two equal loads in each
    are one (the compiler merges them).
    """
    head = pl.program_id(0)

    def body(i, total):
        for _ in range(2):
            total += pool[table[head, i]].astype(jnp.int32).astype(F32).sum(axis=1)
        return total

    total = jnp.zeros(ROWS)
    for _ in range(reads):
        total = jax.lax.fori_loop(0, pl.cdiv(length[head], T), body, total)
    out[head] = total


@pytest.mark.parametrize("reads", [1, 2])
def test_a_dynamic_loop_over_pages(reads):
    def sums(table, length, pool):
        return triton_call(partial(page_sums, reads=reads), table, length, pool)

    counted = count_traffic(sums, TABLE, LENGTHS, pool)
    assert counted.operands() == {
        "length": (4 * HEADS * reads, 0),
        "table": (4 * 5 * reads, 0),
        "pool": (5 * PAGE * reads, 0),  # a page that is read twice shows as twice the bytes
        "toy.0": (0, 4 * HEADS * ROWS),
    }
    assert [k.name for k in counted.kernels] == ["toy"] and not counted.assumed


def test_a_program_stands_for_others():
    def sums(table, length, pool):
        return triton_call(partial(page_sums, reads=1), table, length, pool)

    counted = count_traffic(
        sums,
        TABLE,
        LENGTHS,
        pool,
        sample=lambda name, grid: [((2,), 1.5 if (name, grid) == ("toy", (3,)) else 0)],
    )
    assert counted.operands()["pool"] == (1.5 * 3 * PAGE, 0)


def test_an_unknown_bound_is_refused():
    def sums(table, length, pool):
        return triton_call(partial(page_sums, reads=1), table, length, pool)

    with pytest.raises(ValueError, match="loop in kernel toy"):
        count_traffic(sums, TABLE, jax.ShapeDtypeStruct(LENGTHS.shape, jnp.int32), pool)


def test_masks_and_shared_elements():
    def kernel(x, y, out):
        lane = jnp.arange(16)
        first = plgpu.load(x.at[pl.program_id(0), lane], mask=lane < 5, other=0.0)
        shared = plgpu.load(y.at[lane // 4])  # four lanes read the same element
        rows = plgpu.load(x.at[pl.program_id(0), pl.ds(0, 16)], mask=lane >= 14, other=0.0)
        plgpu.store(out.at[pl.program_id(0), lane], first + shared + rows, mask=lane != 3)

    def masked(x, y):
        return triton_call(kernel, x, y, shape=(HEADS, 16))

    counted = count_traffic(
        masked, jax.ShapeDtypeStruct((HEADS, 16), F32), jax.ShapeDtypeStruct((4,), F32)
    )
    assert counted.operands() == {
        "x": (HEADS * 4 * (5 + 2), 0),
        "y": (HEADS * 4 * 4, 0),
        "toy.0": (0, HEADS * 4 * 15),
    }


def test_branches_and_flops():
    def kernel(flag, data, x, out):
        pl.when(flag[0] == 2)(lambda: out.__setitem__(0, x[...].sum()))  # taken
        pl.when(flag[0] == 3)(lambda: out.__setitem__(1, x[...].sum()))  # not taken
        product = jnp.dot(x[...], x[...], preferred_element_type=F32)
        # unknown: the larger branch
        pl.when(data[0] > 0)(lambda: out.__setitem__(2, product.sum()))

    def branches(flag, data, x):
        return triton_call(kernel, flag, data, x, grid=(1,), shape=(4,))

    counted = count_traffic(
        branches,
        np.array([2], np.int32),
        jax.ShapeDtypeStruct((1,), F32),
        jax.ShapeDtypeStruct((16, 16), F32),
    )
    assert counted.operands() == {
        "flag": (8, 0),
        "data": (4, 0),
        "x": (3 * 1024, 0),
        "toy.0": (0, 8),
    }
    assert counted.flops == 2 * 16**3 and counted.assumed == {
        "toy: a branch depends on unknown data"
    }


def test_atomics_and_aliases():
    def kernel(index, x, old, out):
        plgpu.atomic_add(out, (index[pl.program_id(0)],), x[pl.program_id(0)])

    def add(index, x, sums):
        return triton_call(kernel, index, x, sums, shape=(8,), input_output_aliases={2: 0})

    counted = count_traffic(
        add,
        np.array([1, 1, 5], np.int32),
        jax.ShapeDtypeStruct((HEADS,), F32),
        jax.ShapeDtypeStruct((8,), F32),
    )
    assert counted.operands() == {"index": (12, 0), "x": (12, 0), "sums": (12, 12)}


def test_known_results_of_one_kernel_drive_the_next():
    def count(length, out):
        out[pl.program_id(0)] = pl.cdiv(length[pl.program_id(0)], T)

    def read(pages, x, out):
        def body(i, total):
            return total + x[i]

        out[0] = jax.lax.fori_loop(0, pages[2], body, 0.0)

    def both(length, x):
        pages = triton_call(count, length, shape=(HEADS,), dtype=jnp.int32)
        return triton_call(read, pages * 2, x, grid=(1,), shape=(1,))

    counted = count_traffic(both, LENGTHS, jax.ShapeDtypeStruct((8,), F32))
    assert counted.operands()["x"] == (6 * 4, 0) and len(counted.kernels) == 2


def tpu_call(
    kernel,
    operands,
    prefetched: int,
    in_specs,
    out_specs,
    out_shape,
    scratch=(),
    grid=(HEADS,),
    aliases=None,
):
    spec = pltpu.PrefetchScalarGridSpec(
        prefetched, grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
    )
    return pl.pallas_call(
        kernel, grid_spec=spec, out_shape=out_shape, input_output_aliases=aliases or {}, name="toy"
    )(*operands)


HBM = pl.BlockSpec(memory_space=pltpu.HBM)


def test_dma_follows_state_in_scratch():
    """Pages of the next head are asked for while the head before is at work: a cursor in SMEM says
    which.
    """

    def kernel(table, length, pool, out, buffer, near, cursor, arrived):
        head = pl.program_id(0)
        pl.when(head == 0)(lambda: cursor.__setitem__(0, 0))
        asked = cursor[0]

        def body(i, _):
            pltpu.make_async_copy(pool.at[table[asked, i], pl.ds(0, 8)], buffer, arrived).start()

        jax.lax.fori_loop(0, pl.cdiv(length[asked], T), body, None)
        cursor[0] = asked + 1

        def send(arrived_too):
            copy = pltpu.make_async_copy(near, out.at[head], arrived_too)
            copy.start()
            copy.wait()

        pl.run_scoped(send, pltpu.SemaphoreType.DMA)

    def move(table, length, pool):
        scratch = [
            pltpu.VMEM((8, T), jnp.uint8),
            pltpu.VMEM((8, T), F32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA,
        ]
        return tpu_call(
            kernel,
            (table, length, pool),
            2,
            [HBM],
            HBM,
            jax.ShapeDtypeStruct((HEADS, 8, T), F32),
            scratch,
        )

    counted = count_traffic(move, TABLE, LENGTHS, pool)
    assert counted.operands() == {
        "table": (4 * TABLE.size, 0),  # scalar prefetch: whole and once
        "length": (4 * HEADS, 0),
        "pool": (5 * 8 * T, 0),  # 8 of 16 rows
        "toy.0": (0, HEADS * 8 * T * 4),
    }


def test_blocks_are_fetched_when_their_index_changes():
    """Grid (3, 4): `x` changes with the first axis, `y` with the second, `z` by a table; the last
    block of `x` is half full.
    """

    def kernel(table, x, y, z, out):
        out[...] = x[...] + y[...] + z[...]

    def add(table, x, y, z):
        block = (2, 128)
        specs = [
            pl.BlockSpec(block, lambda i, j, t: (i, 0)),
            pl.BlockSpec(block, lambda i, j, t: (j, 0)),
            pl.BlockSpec((None, *block), lambda i, j, t: (t[i], 0, 0)),
        ]
        out = jax.ShapeDtypeStruct((5, 128), F32)
        return tpu_call(
            kernel,
            (table, x, y, z),
            1,
            specs,
            pl.BlockSpec(block, lambda i, j, t: (i, 0)),
            out,
            grid=(3, 4),
        )

    shape = partial(jax.ShapeDtypeStruct, dtype=F32)
    counted = count_traffic(
        add, np.array([1, 1, 0], np.int32), shape((5, 128)), shape((8, 128)), shape((2, 2, 128))
    )
    row = 128 * 4
    assert counted.operands() == {
        "table": (12, 0),
        "x": (5 * row, 0),
        "y": (3 * 8 * row, 0),
        "z": (2 * 2 * row, 0),  # heads 0 and 1 share their block
        "toy.0": (0, 5 * row),
    }


@pytest.mark.parametrize("implementation", ["triton", "mosaic_tpu"])
def test_decode_attention_reads_each_live_page_once(implementation):
    """384 high and 192 low tokens a head, so that Triton's steps and all but one TPU page are
    full.
    """
    setting = Setting(Model("tiny", 2, 2, 2, 64), MIXES[2], 720, 1, implementation)
    assert setting.lengths == (384, 192)
    case, layout = decode_case(setting), setting.layout
    counted = count_traffic(case.function, *case.arguments)
    moved = counted.operands()
    whole_pages = setting.heads * sum(setting.pages_of_head()) * layout.tokens
    payload = {"triton": case.must["pages.payload"], "mosaic_tpu": whole_pages * layout.rows}[
        implementation
    ]
    significance = {
        "triton": case.must["pages.significance"],
        "mosaic_tpu": 2 * 4 * whole_pages * max(layout.blocks),
    }[implementation]
    assert moved["pages.payload"] == (payload, 0)
    assert moved["pages.significance"] == (significance / 2, significance / 2)
    assert (
        counted.flops >= 4 * setting.heads * 2 * 64 * sum(setting.lengths) and not counted.assumed
    )
