"""`memory_report` against bytes and tokens counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax import CompressionPolicy, diffkv, make_cache, memory_report
from diffkv_jax.cache.cache import KVCache, with_counters
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.tiny import tiny_model

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def counted() -> KVCache:
    """Two layers, two requests, two KV heads of 64 channels in float32, with lengths put in by
    hand.
    """
    model, _ = tiny_model(q_heads=4, kv_heads=2)
    cache = make_cache(model, diffkv(1.0, 0.02), [1000, 1000])
    tier_len = np.zeros((2, 2, 2, 2), np.int32)
    tier_len[0, 0, 0] = 200, 100
    tier_len[1, 0, 1] = 1, 0
    tier_len[1, 1, 0] = 0, 33
    cache = with_counters(cache, seq_len=jnp.array([500, 60]), recent_len=jnp.array([64, 60]))
    return with_part(cache, "stored.tier_len", jnp.asarray(tier_len))


def test_report_equals_hand_count(counted):
    report, layout = memory_report(counted), counted.spec.layout
    # K, V, two scales and zero points, significance, position
    high, low = 64 + 32 + 8 + 4 + 2, 32 + 16 + 8 + 4 + 2
    assert (layout.token_bytes(0), layout.token_bytes(1)) == (
        high,
        low,
    ) and high - 96 == low - 48 == 14
    recent = (64 + 60) * 2 * 2  # tokens, layers, heads
    assert report.logical == 201 * high + 133 * low + recent * (2 * 64 * 4 + 4)
    assert report.bf16 == (500 + 60) * 2 * 2 * 2 * 64 * 2
    arrays = jax.tree.leaves(counted)
    assert report.pool == sum(x.nbytes for x in arrays)
    pages = counted.stored.pages
    page = (
        pages.payload.nbytes + pages.meta.nbytes + pages.significance.nbytes + pages.position.nbytes
    ) // pages.num_pages
    assert page == layout.page_bytes
    per_page = [32 * blocks for blocks in layout.blocks]
    used = -(-200 // per_page[0]) - (-100 // per_page[1]) + 1 - (-33 // per_page[1])
    assert report.pages.sum() == used
    # 4: the page's place in the free ring
    assert report.allocated == report.pool - (pages.num_pages - used) * (page + 4)
    assert report.logical < report.allocated < report.pool


def test_report_counts_tokens(counted):
    report = memory_report(counted)
    np.testing.assert_array_equal(report.tokens[0, 0, 0], [200, 100, 64])
    np.testing.assert_array_equal(report.tokens[..., :2], counted.stored.tier_len)
    np.testing.assert_array_equal(report.tokens[:, 1, :, 2], 60)
    # impossible lengths, but counted
    assert report.dropped[0, 0, 0] == 500 - 364 and report.dropped[1, 1, 0] == 60 - 93
    np.testing.assert_allclose(report.kept_fraction, np.array([201, 133, 496]) / (4 * 560))
    assert [name.split()[-1] for name in report.tier_names] == ["K8V4", "K4V2"]
    shared = report.allocated - report.allocated_bytes.sum()
    ring = counted.stored.ring
    counters = (ring.start, ring.count, *counted.counters, counted.fingerprint)
    assert shared == sum(x.nbytes for x in counters)
    layout = counted.spec.layout
    page = layout.page_bytes + 4  # 4: the page's place in the free ring
    wanted = [layout.pages_for(0, 200) * page, layout.pages_for(1, 100) * page]
    tables = (counted.spec.max_pages + 2 + 2) * 4  # page ids, two lengths, two thresholds
    np.testing.assert_array_equal(
        report.allocated_bytes[0, 0, 0], [*wanted, tables + (64 + 32) * (2 * 64 * 4 + 4)]
    )
    assert report.logical == report.logical_bytes.sum()
    assert "K8V4" in str(report) and "dropped" in str(report)


def test_report_of_a_model_with_windows():
    model, _ = tiny_model(q_heads=4, kv_heads=2, layers=3, windows=(32, None, 32))
    cache = make_cache(model, CompressionPolicy.none(), [300])
    cache = with_counters(cache, seq_len=jnp.array([100]), recent_len=jnp.array([64]))
    cache = with_part(cache, "stored.tier_len", jnp.full_like(cache.stored.tier_len, 36))
    report = memory_report(cache)
    token = 2 * 64 * 4
    side = cache.stored.pages.position.dtype.itemsize
    assert report.logical == 2 * 36 * (token + side) + 2 * 64 * token + 2 * 2 * 32 * token
    assert report.bf16 == (2 * 100 + 2 * 2 * 32) * token // 2
    assert report.pool == sum(x.nbytes for x in jax.tree.leaves(cache))
    assert not report.dropped.any()
