"""Attention of a prompt chunk and its column sums, over pages full of rubbish outside the live
tokens, against float64 NumPy.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from prefill_cases import (
    CASES,
    CHECKED,
    NATIVE_CASES,
    PAIR,
    SLOTS,
    STORED,
    Case,
    Setting,
    attention_and_sums,
    case,
    native_case,
)

from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.decode_attention import Heads
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.pallas_kernels.prefill_attention import Chunk, Scale, column_sums, prefill_attention
from diffkv_jax.testing.random_pool import on_device
from diffkv_jax.testing.readback import slot_addresses


@pytest.fixture(
    params=[param for param in IMPLEMENTATIONS if param.values[0].interpret != "checked"]
)
def kernels(request) -> Kernels:
    """Every implementation; the interpreter that checks every access is slow and has a test of its
    own.
    """
    return request.param


@pytest.mark.daily(8)
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name: str, kernels: Kernels):
    this = case(name, kernels)
    this.check(this.chunk, this.pool)


@pytest.mark.slow
def test_no_race_and_no_read_outside():
    """The TPU kernels, with buffers that hold NaN until something arrives."""
    this = Case(CHECKED, Kernels("mosaic_tpu", "checked"))
    this.check(this.chunk, this.pool)
    assert not interpret_pallas_call.races.races_found


def test_column_sums_are_those_of_the_observing_rows(kernels: Kernels):
    """All masses of the observing rows, summed over one head's keys, with one query head a group:
    one a row.
    """
    this = case("one full tier, chunk of 64", kernels)
    _, _, sums = this.run(this.chunk, this.pool)
    for head, n in enumerate(this.chunk.length):
        at = slot_addresses(this.layout, this.pool.page_table[head], 0, this.pool.tier_len[head, 0])
        stored = sums.pages[at].astype(np.float64) - this.pool.pages["significance"][at]
        mass = stored.sum() + sums.recent[head].sum() + sums.chunk[head].sum()
        assert mass == pytest.approx(min(n, this.observe), abs=2e-3)


@pytest.mark.parametrize(
    "name", ["bfloat16, several blocks of rows and keys", "several blocks of rows and keys"]
)
def test_the_length_of_the_chunk_does_not_matter(name: str):
    """Rows behind more padding, as beside a longer prompt, come out bit for bit the same: other
    rows then share a block with them.
    """
    this = native_case(name)
    alone = this.run(this.chunk, this.pool)
    for more in (1, 68, 324):
        q, k, v = (np.pad(x, [(0, 0)] * (x.ndim - 2) + [(more, 0), (0, 0)]) for x in this.chunk[:3])
        out, lse, sums = this.run(Chunk(q, k, v, this.chunk.length), this.pool)
        for head, n in enumerate(this.chunk.length):
            own, before = slice(out.shape[2] - n, None), slice(alone[0].shape[2] - n, None)
            np.testing.assert_array_equal(out[head, :, own], alone[0][head, :, before])
            np.testing.assert_array_equal(lse[head, :, own], alone[1][head, :, before])
            np.testing.assert_array_equal(sums.chunk[head, own], alone[2].chunk[head, before])
        np.testing.assert_array_equal(sums.pages, alone[2].pages)
        assert (out[0, :, -1] != alone[0][1, :, -1]).any(), "the comparison sees another head"


@pytest.mark.daily(2)
def test_padding_and_later_rows_do_not_matter(kernels: Kernels):
    """Padded rows may hold anything finite; a row does not see those after it."""
    this = case("chunk of 32, all observe", kernels)
    first = this.chunk.k.shape[1] - this.chunk.length[:, None]
    padded = (np.arange(this.chunk.k.shape[1]) < first)[..., None]
    k, v = (np.where(padded, 1e4, x).astype(np.float32) for x in (this.chunk.k, this.chunk.v))
    q = np.where(padded[:, None], -77.0, this.chunk.q).astype(np.float32)
    this.check(this.chunk._replace(q=q, k=k, v=v), this.pool)
    k, v = k.copy(), v.copy()
    k[:, -1] += 3
    v[:, -1] -= 3
    (one, *_), (other, *_) = (
        this.run(this.chunk, this.pool),
        this.run(this.chunk._replace(k=k, v=v), this.pool),
    )
    for head, n in enumerate(this.chunk.length):
        np.testing.assert_array_equal(one[head, :, 32 - n : -1], other[head, :, 32 - n : -1])


def test_a_chunk_without_tokens_scores_nothing(kernels: Kernels):
    this = case("chunk of 32, all observe", kernels)
    empty = this.chunk._replace(length=np.zeros_like(this.chunk.length))
    _, _, sums = this.run(empty, this.pool)
    np.testing.assert_array_equal(sums.pages, this.pool.pages["significance"])
    assert not sums.recent.any() and not sums.chunk.any()


@pytest.mark.parametrize("name", ["chunk of 32, all observe", "bfloat16"])
@pytest.mark.parametrize(
    "mistake",
    [
        "table shifted by one",
        "a token too many",
        "recent too few",
        "a row too few",
        "rows shifted by one",
    ],
)
def test_the_comparison_sees_mistakes(mistake: str, name: str, kernels: Kernels):
    this = case(name, kernels)
    chunk, pool = this.chunk, this.pool
    shifted = np.clip(np.roll(pool.page_table, 1, axis=1), 0, len(pool.pages["payload"]) - 1)
    bad = {
        "table shifted by one": (chunk, pool._replace(page_table=shifted)),
        "a token too many": (chunk, pool._replace(tier_len=pool.tier_len + (pool.tier_len > 0))),
        "recent too few": (chunk, pool._replace(recent_len=np.maximum(pool.recent_len - 1, 0))),
        "a row too few": (chunk._replace(length=np.maximum(chunk.length - 1, 0)), pool),
        "rows shifted by one": (chunk._replace(k=np.roll(chunk.k, 1, axis=1)), pool),
    }[mistake]
    with pytest.raises(AssertionError):
        this.check(*bad)


@pytest.mark.parametrize("name", NATIVE_CASES)
def test_native_kernels(name: str):
    """Sizes and codecs that only the native kernels handle in ways of their own; a missing token is
    noticed.
    """
    this = native_case(name)
    this.check(this.chunk, this.pool)
    with pytest.raises(AssertionError):
        this.check(
            this.chunk, this.pool._replace(tier_len=this.pool.tier_len - (this.pool.tier_len > 0))
        )


@pytest.mark.parametrize(
    "name", ["bfloat16, several blocks of rows and keys", "groups of odd width in bfloat16"]
)
def test_other_heads_do_not_matter_to_native_kernels(name: str):
    """A head's results have the same bits whatever the other heads hold."""
    this = native_case(name)
    out, lse, sums = this.run(this.chunk, this.pool)
    for head in (1, 4):
        mine = np.arange(len(STORED)) == head
        alone = this.pool._replace(
            tier_len=this.pool.tier_len * mine[:, None], recent_len=this.pool.recent_len * mine
        )
        only = this.run(this.chunk._replace(length=this.chunk.length * mine), alone)
        for got, wanted in (
            (only[0], out),
            (only[1], lse),
            (only[2].recent, sums.recent),
            (only[2].chunk, sums.chunk),
        ):
            np.testing.assert_array_equal(got[head], wanted[head])
        for tier, n in enumerate(this.pool.tier_len[head]):
            at = slot_addresses(this.layout, this.pool.page_table[head], tier, n)
            np.testing.assert_array_equal(only[2].pages[at], sums.pages[at])


@pytest.mark.parametrize("what", ["page id", "tier_len", "recent_len", "length", "layer"])
@pytest.mark.parametrize("operation", ["prefill_attention", "column_sums"])
def test_native_kernels_refuse_what_leads_out_of_an_array(operation: str, what: str):
    this = native_case("bfloat16, groups, G=5, d=128")
    chunk, pool = this.chunk, this.pool
    pages, heads = on_device(pool, Pages, Heads)
    table = pool.page_table.copy()
    table[1, 0] = len(pool.pages["payload"])
    bad = {
        "page id": (chunk, heads._replace(page_table=table)),
        "tier_len": (chunk, heads._replace(tier_len=pool.tier_len * 100)),
        "recent_len": (chunk, heads._replace(recent_len=pool.recent_len + SLOTS)),
        "length": (chunk._replace(length=chunk.length + 1), heads),
        "layer": (chunk, heads._replace(layer=np.int32(2))),
    }[what]
    lse = jnp.zeros(chunk.q.shape[:3])
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="INVALID_ARGUMENT"):
        chunk, heads = bad
        if operation == "prefill_attention":
            jax.block_until_ready(
                prefill_attention(
                    chunk, pages, this.layout, heads, this.scale, kernels=Kernels("cpu")
                )
            )
        else:
            jax.block_until_ready(
                column_sums(
                    chunk, lse, 8, pages, this.layout, heads, this.scale, kernels=Kernels("cpu")
                )
            )


def test_the_comparison_sees_swapped_keys_and_values(kernels: Kernels):
    this = case("one full tier, chunk of 64", kernels)
    with pytest.raises(AssertionError):
        this.check(this.chunk, this.pool, swap=True)


def test_the_comparison_sees_a_maximum_where_the_mean_is_asked(kernels: Kernels):
    this = case("chunk of 32, all observe", kernels)
    with pytest.raises(AssertionError):
        this.check(this.chunk, this.pool, over="mean")


@pytest.mark.parametrize(
    "implementation, setting, pages, table, message",
    [
        (
            "triton",
            Setting(("K4V2:4,8",), 64, 1, 16, 16),
            9,
            3,
            "formats K4V2:4,8 at head_dim=64 .* 8 channels.*implementation='xla'",
        ),
        (
            "triton",
            Setting(("K8V8",), 96, 1, 16, 16),
            9,
            3,
            "piece of 96 channels.*implementation='xla'",
        ),
        (
            "triton",
            Setting(PAIR, 128, 1, 16, 16),
            400_000,
            3,
            "between 2 and 4 GiB.*implementation='xla'",
        ),
        (
            "mosaic_tpu",
            Setting(PAIR, 128, 1, 16, 16, tokens=128),
            9,
            2000,
            "SMEM.*implementation='xla'",
        ),
    ],
)
def test_what_a_backend_cannot_do_is_refused(
    implementation: str, setting: Setting, pages: int, table: int, message: str
):
    kernels, heads, d = Kernels(implementation), 128, setting.head_dim
    layout = PageLayout.solve(
        tuple(map(KVFormat.parse, setting.tiers)),
        d,
        tokens=setting.tokens,
        meta_dtype=kernels.meta_dtype,
    )
    numbers, ints = (
        partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16),
        partial(jax.ShapeDtypeStruct, dtype=jnp.int32),
    )
    window = numbers((1, heads, SLOTS, d))
    arguments = (
        Chunk(
            numbers((heads, setting.group, setting.chunk, d)),
            *[numbers((heads, setting.chunk, d))] * 2,
            ints((heads,)),
        ),
        jax.eval_shape(partial(Pages.zeros, layout, pages)),
        Heads(
            ints((heads, table)),
            ints((heads, layout.tiers)),
            window,
            window,
            ints((heads,)),
            ints(()),
        ),
    )
    attend = partial(
        attention_and_sums,
        layout=layout,
        observe=setting.observe,
        scale=Scale(1.0, None),
        kernels=kernels,
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda chunk, pages, heads: attend(chunk, pages, heads=heads), *arguments)
