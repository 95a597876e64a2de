"""Attention of a prompt chunk and its column sums, over pages full of rubbish outside the live
tokens, against float64 NumPy.
"""

from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.decode_attention import Heads
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.pallas_kernels.prefill_attention import Chunk, Scale, column_sums, prefill_attention
from diffkv_jax.testing.random_pool import Pool, on_device, random_pool
from diffkv_jax.testing.readback import read_tier, slot_addresses

SLOTS, MAX_LEN = 9, 640
STORED = [(0, 0), (70, 0), (0, 70), (33, 65), (540, 3), (1, 0)]
RECENT = [0, 9, 8, 1, 5, 0]


class Setting(NamedTuple):
    """One case."""

    tiers: tuple[str, ...]
    head_dim: int
    group: int  # query heads
    chunk: int
    observe: int
    cap: float | None = None
    tokens: int = 32  # of a block
    dtype: str = "float32"
    over: Literal["max", "mean"] = "max"  # one score of a group


PAIR, GROUPED = ("K8V4", "K4V2"), ("K8V4:1,2", "K4V2:2,4")
CASES = {
    "chunk of 32, all observe": Setting(PAIR, 64, 3, 32, 32),
    "groups, d=128, T=64": Setting(GROUPED, 128, 4, 64, 16, tokens=64),
    "full tier above, d=256, T=128, chunk shorter than a block": Setting(
        ("full", "K4V2"), 256, 1, 16, 16, tokens=128
    ),
    # blocks of rows overlap
    "chunk of 128, 100 observe, capped, G=8": Setting(PAIR, 64, 8, 128, 100, 4.0, tokens=128),
    "one full tier, chunk of 64": Setting(("full",), 64, 1, 64, 64),
    # several blocks of queries and of keys
    "chunk of 1024": Setting(("K4V4",), 64, 1, 1024, 64, tokens=128),
    "bfloat16": Setting(PAIR, 64, 1, 32, 20, tokens=128, dtype="bfloat16"),
    "levels of the normal distribution": Setting(("K4nV4n", "K2nV2n"), 64, 2, 32, 32),
    "mean of G=3": Setting(("K4V4",), 64, 3, 16, 16, tokens=128, over="mean"),
}
CHECKED = Setting(PAIR, 64, 2, 16, 16)
NATIVE_CASES = {
    "bfloat16, several blocks of rows and keys": Setting(PAIR, 64, 3, 700, 64, dtype="bfloat16"),
    "bfloat16, groups, G=5, d=128": Setting(GROUPED, 128, 5, 100, 70, dtype="bfloat16", tokens=64),
    "bfloat16, full tier above, capped, G=16, d=256": Setting(
        ("full", "K2V1"), 256, 16, 40, 40, 3.0, dtype="bfloat16"
    ),
    "bfloat16, K1V1, G=7": Setting(("K1V1",), 64, 7, 33, 33, dtype="bfloat16"),
    "bfloat16, levels of the normal distribution": Setting(
        ("K4nV4n", "K1nV2n"), 64, 3, 40, 40, dtype="bfloat16"
    ),
    "head size 80 in bfloat16": Setting(PAIR, 80, 2, 50, 20, dtype="bfloat16"),
    "head size 24": Setting(PAIR, 24, 3, 50, 20, tokens=128),
    "groups of odd width in bfloat16": Setting(("K8V4:2,2",), 6, 2, 300, 20, dtype="bfloat16"),
    "several blocks of rows and keys": Setting(PAIR, 64, 3, 700, 700),
}


class Case:
    """Random stored tokens and a random chunk, and the compiled kernels."""

    def __init__(self, setting: Setting, kernels: Kernels):
        tiers, head_dim, group, chunk_len, self.observe, cap, tokens, self.dtype, self.over = (
            setting
        )
        formats = tuple(KVFormat.parse(tier) for tier in tiers)
        self.layout = PageLayout.solve(
            formats,
            head_dim,
            tokens=tokens,
            max_len=MAX_LEN,
            meta_dtype=kernels.meta_dtype,
            group=self.over,
        )
        self.scale = Scale(1.3 * head_dim**-0.5, cap)
        stored = [sizes[: self.layout.tiers] for sizes in STORED]
        pool = random_pool(
            self.layout, stored, RECENT, max_len=MAX_LEN, slots=SLOTS, seed=chunk_len
        )
        self.pool = pool._replace(
            recent_k=self.rounded(pool.recent_k), recent_v=self.rounded(pool.recent_v)
        )
        lengths = [chunk_len, 5, 0, chunk_len // 2 + 1, chunk_len, 1]
        rng = np.random.default_rng(5)
        q, k, v = (
            self.rounded(rng.normal(size=(len(STORED), n, chunk_len, head_dim)))
            for n in (group, 1, 1)
        )
        # padded rows hold draws like the others
        self.chunk = Chunk(q, k[:, 0], v[:, 0], np.array(lengths, np.int32))
        self._kernel = jax.jit(
            partial(
                _both, layout=self.layout, observe=self.observe, scale=self.scale, kernels=kernels
            )
        )

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """Numbers that the case's type holds exactly, in float32."""
        return x.astype(jnp.dtype(self.dtype)).astype(np.float32)

    def run(self, chunk: Chunk, pool: Pool):
        """Output, log-sum-exp and column sums."""
        pages, heads = on_device(pool, Pages, Heads)
        q, k, v = (jnp.asarray(x, self.dtype) for x in (chunk.q, chunk.k, chunk.v))
        return jax.device_get(self._kernel(Chunk(q, k, v, chunk.length), pages, heads=heads))

    def dense(self, head: int, swap: bool = False, over: str | None = None):
        """Output [G, n, d] and log-sum-exp [G, n] of the chunk's n tokens, and the column sums of
        stored, recent and chunk keys.
        """
        pool, n = self.pool, int(self.chunk.length[head])
        live, sizes = int(pool.recent_len[head]), pool.tier_len[head]
        read = [
            read_tier(Pages(**pool.pages), self.layout, pool.page_table[head], tier, size)
            for tier, size in enumerate(sizes)
        ]
        own = slice(self.chunk.k.shape[1] - n, None)
        k = np.concatenate(
            [*(tier.k for tier in read), pool.recent_k[head, :live], self.chunk.k[head, own]]
        ).astype(np.float64)
        v = np.concatenate(
            [*(tier.v for tier in read), pool.recent_v[head, :live], self.chunk.v[head, own]]
        ).astype(np.float64)
        k, v = (v, k) if swap else (k, v)
        logits = self.chunk.q[head, :, own].astype(np.float64) @ k.T * self.scale.sm_scale
        if self.scale.soft_cap:
            logits = self.scale.soft_cap * np.tanh(logits / self.scale.soft_cap)
        before = len(k) - n
        logits[:, np.arange(len(k)) > before + np.arange(n)[:, None]] = -np.inf
        lse = np.log(np.exp(logits).sum(axis=-1))
        p = np.exp(logits - lse[..., None])
        sums = p[:, max(n - self.observe, 0) :].sum(axis=1)
        sums = sums.max(axis=0) if (over or self.over) == "max" else sums.sum(axis=0) / len(sums)
        return p @ v, lse, np.split(sums, np.cumsum([*sizes, live]))

    def check(self, chunk: Chunk, pool: Pool, swap: bool = False, over: str | None = None) -> None:
        """The kernels on `chunk` and `pool` give what this case must give."""
        out, lse, sums = self.run(chunk, pool)
        wanted = self.pool.pages["significance"].copy()
        for head, n in enumerate(self.chunk.length):
            own = slice(self.chunk.k.shape[1] - n, None)
            output, total, (*tiers, recent, mine) = self.dense(head, swap, over)
            # weights are rounded, logits not
            loose = (
                dict(rtol=1e-5, atol=3e-5)
                if self.dtype == "float32"
                else dict(rtol=4e-3, atol=2e-2)
            )
            np.testing.assert_allclose(out[head, :, own], output, **loose)
            np.testing.assert_allclose(lse[head, :, own], total, rtol=1e-5, atol=1e-5)
            same_sums(sums.recent[head], recent, slice(0, len(recent)))
            same_sums(sums.chunk[head], mine, own)
            for tier, score in enumerate(tiers):
                wanted[
                    slot_addresses(self.layout, self.pool.page_table[head], tier, len(score))
                ] += score
        old = self.pool.pages["significance"]
        untouched = (wanted == old) | np.isnan(old)
        np.testing.assert_array_equal(sums.pages[untouched], old[untouched])
        np.testing.assert_allclose(sums.pages[~untouched], wanted[~untouched], rtol=5e-6)


def same_sums(got: np.ndarray, wanted: np.ndarray, where: slice) -> None:
    """`wanted` at `where`, zeros elsewhere."""
    full = np.zeros(got.shape)
    full[where] = wanted
    np.testing.assert_allclose(got, full, rtol=3e-5, atol=1e-9)


def _both(
    chunk: Chunk,
    pages: Pages,
    heads: Heads,
    *,
    layout,
    observe: int,
    scale: Scale,
    kernels: Kernels,
):
    out, lse = prefill_attention(chunk, pages, layout, heads, scale, kernels=kernels)
    return out, lse, column_sums(chunk, lse, observe, pages, layout, heads, scale, kernels=kernels)


def case(name: str, kernels: Kernels) -> Case:
    if kernels == Kernels("mosaic_tpu") and CASES[name].tokens != kernels.tokens_per_block:
        pytest.skip("a TPU takes blocks of 128 tokens")
    return _case(name, kernels)


@cache
def _case(name: str, kernels: Kernels) -> Case:
    return Case(CASES[name], kernels)


def native_case(name: str) -> Case:
    if all(param.id != "cpu" for param in IMPLEMENTATIONS):
        pytest.skip("no native kernels here")
    return _native_case(name)


@cache
def _native_case(name: str) -> Case:
    return Case(NATIVE_CASES[name], Kernels("cpu"))


@pytest.fixture(
    params=[param for param in IMPLEMENTATIONS if param.values[0].interpret != "checked"]
)
def kernels(request) -> Kernels:
    """Every implementation; the interpreter that checks every access is slow and has a test of its
    own.
    """
    return request.param


@pytest.mark.daily(5)
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
        _both, layout=layout, observe=setting.observe, scale=Scale(1.0, None), kernels=kernels
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda chunk, pages, heads: attend(chunk, pages, heads=heads), *arguments)
