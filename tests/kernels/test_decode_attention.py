"""Decode attention over pages full of rubbish outside the live tokens, against a dense softmax in
float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import BFLOAT16, CASES, CHECKED, LENGTHS, SLOTS, Case, case, same
from implementations import IMPLEMENTATIONS, LONG, NATIVE, SLOW, crossed, marked

from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.testing.random_pool import Pool
from diffkv_jax.testing.readback import slot_addresses

FIRST = "K8V4+K4V2, G=4, d=128, T=128"
PAIRS = crossed(
    [pytest.param(name, id=name) for name in CASES],
    marked(IMPLEMENTATIONS, mosaic_tpu=SLOW, mosaic_tpu_checked=LONG),
    {(FIRST, "mosaic_tpu"): (), (FIRST, "mosaic_tpu_checked"): SLOW},
)


@pytest.mark.daily(8)
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
