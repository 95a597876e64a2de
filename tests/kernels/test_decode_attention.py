"""Decode attention over pages full of rubbish outside the live tokens, against a dense softmax in
float64.
"""

from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS, LONG, NATIVE, SLOW, crossed, marked

from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.decode_attention import Heads, Sliding, decode_attention
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.testing.random_pool import Pool, on_device, random_pool
from diffkv_jax.testing.readback import read_tier, slot_addresses

SLOTS, MAX_LEN = 9, 640
# 540 and 520: more than one chunk of the loop
LENGTHS = [(0, 0), (0, 70), (130, 0), (33, 65), (540, 5), (0, 0), (1, 520)]
RECENT = [0, 3, 9, 1, 8, 5, 0]


class Shape(NamedTuple):
    """One line of the table."""

    tiers: tuple[str, ...]
    head_dim: int
    group: int  # query heads a KV head
    cap: float | None = None
    scored: bool = True
    tokens: int = 32  # lanes of a page
    window: int | None = None  # of a sliding window
    dtype: str = "bfloat16"  # of tokens kept exactly
    over: Literal["max", "mean"] = "max"  # one score of a group


CASES = {
    "K8V4+K4V2, G=1": Shape(("K8V4", "K4V2"), 64, 1),
    "K8V4+K4V2, G=3, d=128": Shape(("K8V4", "K4V2"), 128, 3),
    "K8V4+K4V2, G=4, d=128, T=128": Shape(("K8V4", "K4V2"), 128, 4, tokens=128),
    "grouped, G=6, capped, d=128": Shape(("K8V4:1,2", "K4V2:2,4"), 128, 6, cap=5.0),
    "K8V8+K4V1, G=16, d=128": Shape(("K8V8", "K4V1"), 128, 16),
    "K2V2, G=8, d=256, T=64": Shape(("K2V2",), 256, 8, tokens=64),
    "K4V4, G=3": Shape(("K4V4",), 64, 3),
    "full, G=3, not scored": Shape(("full",), 64, 3, scored=False),
    "full+K4V2, G=6": Shape(("full", "K4V2"), 64, 6),
    "full float32, T=128": Shape(("full",), 64, 2, dtype="float32", tokens=128),
    "full float16+K4V2, sliding": Shape(("full", "K4V2"), 64, 4, dtype="float16", window=90),
    "sliding, capped, T=128": Shape(("K8V4", "K4V2"), 128, 3, cap=3.0, window=40, tokens=128),
    "K4nV4n+K2nV1n, G=3, d=128": Shape(("K4nV4n", "K2nV1n"), 128, 3),
    "K4V4, mean of G=3": Shape(("K4V4",), 64, 3, over="mean"),
}
BFLOAT16 = (
    "K8V4+K4V2, G=4, d=128, T=128",
    "K8V4+K4V2, G=3, d=128",
    "grouped, G=6, capped, d=128",
    "full+K4V2, G=6",
    "K4nV4n+K2nV1n, G=3, d=128",
)
# cases for the slow interpreter
CHECKED = ("K8V4+K4V2, G=4, d=128, T=128", "full float32, T=128", "sliding, capped, T=128")


class Attended(NamedTuple):
    """What decode attention gives: output [B, G, d], the pool's significance, scores of the recent
    slots [B, SLOTS].
    """

    output: np.ndarray
    significance: np.ndarray
    recent: np.ndarray


class Case:
    """Random tokens and queries of one case, and the compiled kernel."""

    def __init__(self, shape: Shape, kernels: Kernels):
        formats = tuple(KVFormat.parse(name, shape.dtype) for name in shape.tiers)
        self.layout = PageLayout.solve(
            formats,
            shape.head_dim,
            tokens=shape.tokens,
            max_len=MAX_LEN,
            scored=shape.scored,
            meta_dtype=kernels.meta_dtype,
            group=shape.over,
        )
        self.over = shape.over
        self.scale, self.cap, self.window = 1.5 * shape.head_dim**-0.5, shape.cap, shape.window
        lengths = [sizes[: self.layout.tiers] for sizes in LENGTHS]
        self.pool = random_pool(
            self.layout, lengths, RECENT, max_len=MAX_LEN, slots=SLOTS, seed=shape.group
        )
        held = np.array(
            [sum(sizes) + recent for sizes, recent in zip(lengths, RECENT, strict=True)], np.int32
        )
        self.position = held - 1  # of the query: the recent tokens are the latest ones
        self.q = (
            np.random.default_rng(9)
            .normal(size=(len(LENGTHS), shape.group, shape.head_dim))
            .astype(np.float32)
        )
        options = dict(
            layout=self.layout,
            max_len=MAX_LEN,
            sm_scale=self.scale,
            logits_soft_cap=shape.cap,
            kernels=kernels,
        )
        sliding = (
            None if shape.window is None else Sliding(shape.window, jnp.asarray(self.position))
        )
        self._kernel = jax.jit(partial(decode_attention, sliding=sliding, **options))

    def run(self, pool: Pool, q: np.ndarray | jax.Array | None = None) -> Attended:
        pages, heads = on_device(pool, Pages, Heads)
        return Attended(
            *jax.device_get(self._kernel(self.q if q is None else q, pages=pages, heads=heads))
        )

    def dense(self, pool: Pool, swap: bool = False, over: str | None = None) -> Attended:
        """The same by a softmax over all live tokens; `swap` takes keys for values, `over` another
        score of a group.
        """
        significance = pool.pages["significance"].copy()
        output, recent = np.zeros(self.q.shape), np.zeros((len(LENGTHS), SLOTS))
        for head, sizes in enumerate(pool.tier_len):
            live = int(pool.recent_len[head])
            read = [
                read_tier(Pages(**pool.pages), self.layout, pool.page_table[head], tier, n)
                for tier, n in enumerate(sizes)
            ]
            k = np.concatenate([pool.recent_k[head, :live], *(tier.k for tier in read)]).astype(
                np.float64
            )
            v = np.concatenate([pool.recent_v[head, :live], *(tier.v for tier in read)]).astype(
                np.float64
            )
            k, v = (v, k) if swap else (k, v)
            if not len(k):
                continue
            position = np.concatenate(
                [
                    self.position[head] - live + 1 + np.arange(live),
                    *(tier.position for tier in read),
                ]
            )
            seen = (
                np.ones(len(k), bool)
                if self.window is None
                else position > self.position[head] - self.window
            )
            if not seen.any():
                continue
            p = softmax(np.asarray(self.q[head], np.float64) @ k.T * self.scale, self.cap, seen)
            output[head] = p @ v
            of_group = (
                p.max(axis=0) if (over or self.over) == "max" else p.sum(axis=0) / len(self.q[head])
            )
            scores = np.split(of_group, np.cumsum([live, *sizes])[:-1])
            recent[head, :live] = scores[0]
            for tier, (n, score) in enumerate(zip(sizes, scores[1:], strict=True)):
                if self.layout.scored:
                    significance[slot_addresses(self.layout, pool.page_table[head], tier, n)] += (
                        score
                    )
        return Attended(
            output, significance, recent if self.layout.scored else np.zeros_like(recent)
        )


def softmax(logits: np.ndarray, cap: float | None, seen: np.ndarray) -> np.ndarray:
    logits = np.where(seen, logits if cap is None else cap * np.tanh(logits / cap), -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def same(got: Attended, wanted: Attended, old: np.ndarray) -> None:
    """Equal within float32 rounding; the significance of everything that is not a live token has
    the bits it had.
    """
    np.testing.assert_allclose(got.output, wanted.output, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(got.recent, wanted.recent, rtol=2e-5, atol=1e-9)
    touched = ~((wanted.significance == old) | np.isnan(old))
    np.testing.assert_array_equal(got.significance[~touched], old[~touched])
    np.testing.assert_allclose(got.significance[touched], wanted.significance[touched], rtol=2e-6)


@cache
def case(name: str, kernels: Kernels = XLA) -> Case:
    return Case(CASES[name], kernels)


FIRST = "K8V4+K4V2, G=4, d=128, T=128"
PAIRS = crossed(
    [pytest.param(name, id=name) for name in CASES],
    marked(IMPLEMENTATIONS, mosaic_tpu=SLOW, mosaic_tpu_checked=LONG),
    {(FIRST, "mosaic_tpu"): (), (FIRST, "mosaic_tpu_checked"): SLOW},
)


@pytest.mark.daily(5)
@pytest.mark.parametrize(("name", "kernels"), PAIRS)
def test_equals_a_dense_softmax(name: str, kernels: Kernels):
    if kernels.interpret == "checked" and name not in CHECKED:
        pytest.skip("the interpreter that checks takes a minute for this one")
    this = case(name, kernels)
    same(this.run(this.pool), this.dense(this.pool), this.pool.pages["significance"])


def test_probabilities_of_a_group_of_one_sum_to_one():
    this = case("K8V4+K4V2, G=1")
    got, old = this.run(this.pool), this.pool.pages["significance"]
    for head, sizes in enumerate(this.pool.tier_len):
        mass = float(got.recent[head].sum())
        for tier, n in enumerate(sizes):
            at = slot_addresses(this.layout, this.pool.page_table[head], tier, n)
            mass += float((got.significance[at].astype(np.float64) - old[at]).sum())
        held = sizes.sum() + this.pool.recent_len[head]
        assert mass == pytest.approx(1.0 if held else 0.0, abs=1e-4)


def test_logits_of_any_size():
    """Logits in the hundreds: the softmax is taken relative to the maximum over all tiers and the
    window.
    """
    this = case("K8V4+K4V2, G=3, d=128")
    q = this.q * 60
    hot = Case.__new__(Case)
    hot.__dict__.update(this.__dict__, q=q)
    got, wanted = this.run(this.pool, q), hot.dense(this.pool)
    assert np.isfinite(got.output).all()
    np.testing.assert_allclose(got.output, wanted.output, rtol=1e-3, atol=1e-3)


def test_a_head_without_tokens_gives_zeros():
    this = case("K8V4+K4V2, G=1")
    got = this.run(this.pool)
    assert not got.output[0].any() and not got.recent[0].any()
    assert got.output[5].any()  # only recent tokens


def test_other_heads_do_not_matter():
    """A head's result has the same bits whatever the other heads hold."""
    this = case("K8V4+K4V2, G=3, d=128")
    got = this.run(this.pool)
    alone = this.pool._replace(
        tier_len=this.pool.tier_len * (np.arange(len(LENGTHS)) == 3)[:, None]
    )
    np.testing.assert_array_equal(this.run(alone).output[3], got.output[3])


@pytest.mark.parametrize("kernels", NATIVE)
def test_a_head_alone(kernels: Kernels):
    """A head's result has the same bits beside as without other heads."""
    this = case("K8V4+K4V2, G=3, d=128", kernels)
    got = this.run(this.pool)
    for head in (3, 6):
        one = slice(head, head + 1)
        pool = this.pool._replace(
            **{name: getattr(this.pool, name)[one] for name in this.pool._fields if name != "pages"}
        )
        alone = this.run(pool, this.q[one])
        np.testing.assert_array_equal(alone.output[0], got.output[head])
        np.testing.assert_array_equal(alone.recent[0], got.recent[head])
        assert (alone.output[0] != got.output[4]).any(), "the comparison sees another head"


@pytest.mark.parametrize("kernels", marked(IMPLEMENTATIONS[:3], mosaic_tpu=SLOW))
@pytest.mark.parametrize(
    "mistake",
    [
        "table shifted by one",
        "a token too many",
        "a token too few",
        "recent too few",
        "tiers swapped",
    ],
)
def test_the_comparison_sees_mistakes(mistake: str, kernels: Kernels):
    this = case("K8V4+K4V2, G=3, d=128", kernels)
    pool, old = this.pool, this.pool.pages["significance"]
    off = (pool.tier_len[:, :1] > 0) * np.array([1, 0], np.int32)
    bad = {
        "table shifted by one": pool._replace(page_table=np.roll(pool.page_table, 1, axis=1)),
        "a token too many": pool._replace(tier_len=pool.tier_len + off),
        "a token too few": pool._replace(tier_len=pool.tier_len - off),
        "recent too few": pool._replace(recent_len=np.maximum(pool.recent_len - 1, 0)),
        "tiers swapped": pool._replace(page_table=np.ascontiguousarray(pool.page_table[:, ::-1])),
    }[mistake]
    with pytest.raises(AssertionError):
        same(this.run(bad), this.dense(pool), old)


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize(
    "mistake", ["a token too many", "a token too few", "recent too few", "other pages"]
)
def test_the_comparison_sees_mistakes_of_native_kernels(mistake: str, kernels: Kernels):
    this = case("K8V4+K4V2, G=3, d=128", kernels)
    pool, old = this.pool, this.pool.pages["significance"]
    off = (pool.tier_len[:, :1] > 0) * np.array([1, 0], np.int32)
    bad = {
        "a token too many": pool._replace(tier_len=pool.tier_len + off),
        "a token too few": pool._replace(tier_len=pool.tier_len - off),
        "recent too few": pool._replace(recent_len=np.maximum(pool.recent_len - 1, 0)),
        "other pages": pool._replace(
            page_table=np.where(
                pool.page_table == pool.page_table[3, 0], pool.page_table[4, 0], pool.page_table
            )
        ),
    }[mistake]
    with pytest.raises(AssertionError):
        same(this.run(bad), this.dense(pool), old)


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize(
    "mistake",
    ["page beyond the pool", "negative page", "tier too long", "negative tier", "window too long"],
)
def test_what_leads_out_of_an_array_is_refused(mistake: str, kernels: Kernels):
    this = case("K8V4+K4V2, G=3, d=128", kernels)
    pool, first = this.pool, this.pool.page_table[3, 0]
    bad = {
        "page beyond the pool": pool._replace(
            page_table=np.where(
                pool.page_table == first, pool.pages["payload"].shape[0], pool.page_table
            )
        ),
        "negative page": pool._replace(
            page_table=np.where(pool.page_table == first, -1, pool.page_table)
        ),
        "tier too long": pool._replace(tier_len=pool.tier_len + np.int32(100_000)),
        "negative tier": pool._replace(tier_len=pool.tier_len - np.int32(10_000)),
        "window too long": pool._replace(recent_len=pool.recent_len + SLOTS + 1),
    }[mistake]
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="page|tier_len|recent_len"):
        this.run(bad)


@pytest.mark.parametrize("name", ["K4V4, G=3", "full, G=3, not scored"])
def test_the_comparison_sees_swapped_keys_and_values(name: str):
    this = case(name)
    with pytest.raises(AssertionError):
        same(this.run(this.pool), this.dense(this.pool, swap=True), this.pool.pages["significance"])


@pytest.mark.parametrize("kernels", marked([*IMPLEMENTATIONS[:3], *NATIVE], mosaic_tpu=SLOW))
def test_the_comparison_sees_a_maximum_where_the_mean_is_asked(kernels: Kernels):
    this = case("K8V4+K4V2, G=3, d=128", kernels)
    got, asked, old = (
        this.run(this.pool),
        this.dense(this.pool, over="mean"),
        this.pool.pages["significance"],
    )
    for scores in ("recent", "significance"):  # either alone
        with pytest.raises(AssertionError):
            same(asked._replace(**{scores: getattr(got, scores)}), asked, old)


@pytest.mark.daily(3)
@pytest.mark.parametrize("kernels", marked([*IMPLEMENTATIONS[1:3], *NATIVE], mosaic_tpu=LONG))
@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_queries(name: str, kernels: Kernels):
    """The kernels multiply in bfloat16: eight bits of the weights. A missing token is further away
    than that.
    """
    this = case(name, kernels)
    q = jnp.asarray(this.q, jnp.bfloat16)
    rounded = Case.__new__(Case)
    rounded.__dict__.update(this.__dict__, q=np.asarray(q, np.float32))
    wanted, old = rounded.dense(this.pool), this.pool.pages["significance"]

    def errors(pool: Pool) -> tuple[float, float]:
        got = this.run(pool, q)
        live = (wanted.significance != old) & ~np.isnan(old)
        np.testing.assert_array_equal(got.significance[~live], old[~live])
        added = (x.significance[live].astype(np.float64) - old[live] for x in (got, wanted))
        return float(np.abs(got.output - wanted.output).max()), float(
            np.abs(np.subtract(*added)).max()
        )

    output, significance = errors(this.pool)
    assert output < 0.02 and significance < 0.005
    fewer = this.pool._replace(tier_len=this.pool.tier_len - (this.pool.tier_len > 0))
    output, significance = errors(fewer)
    assert output > 0.05 and significance > 0.01
