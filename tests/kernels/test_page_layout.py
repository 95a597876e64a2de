"""The geometry of a page: the library's own choice, and the official DiffKV one through the same
search.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax.pallas_kernels.codecs import Block, KVFormat
from diffkv_jax.pallas_kernels.pages import (
    PageLayout,
    Pages,
    least_waste,
    page_column,
    tier_page_ids,
)

# --- the library's pages ---

PAIRS = (
    ("K8V4", "K4V2"),
    ("K8V4:1,2", "K4V2:2,4"),
    ("K8V8", "K4V1"),
    ("K8V4",),
    ("full",),
    ("full", "K4V2"),
)


def solve(names, head_dim: int = 128, **options) -> PageLayout:
    return PageLayout.solve(tuple(KVFormat.parse(name) for name in names), head_dim, **options)


def rows_of(fmt: KVFormat, head_dim: int) -> int:
    return fmt.key.rows(head_dim) + fmt.value.rows(head_dim)


def test_default_page_by_hand():
    """d = 128: K8V4 takes 128 + 64 rows, K4V2 64 + 32, so 192 rows hold one block of the one or two
    of the other.
    """
    layout = solve(("K8V4", "K4V2"))
    assert (layout.rows, layout.blocks, layout.meta_rows, layout.tokens) == (192, (1, 2), 8, 32)
    assert [layout.tokens_per_page(tier) for tier in (0, 1)] == [32, 64]
    assert layout.page_bytes == 32 * (192 + 2 * 8 + 2 * 6)
    assert [layout.token_bytes(tier) for tier in (0, 1)] == [192 + 8 + 6, 96 + 8 + 6]
    np.testing.assert_allclose(layout.waste(), [1 - 32 * 206 / 7040, 0])
    assert [layout.pages_for(1, n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_no_other_number_of_rows_wastes_less(names, head_dim: int):
    layout = solve(names, head_dim)
    need = [rows_of(fmt, head_dim) for fmt in layout.formats]
    metas = [fmt.key.meta_rows + fmt.value.meta_rows for fmt in layout.formats]

    def worst(rows: int) -> float:
        blocks = [rows // n for n in need]
        # bytes
        lane = rows + 2 * max(n * m for n, m in zip(blocks, metas, strict=True)) + 6 * max(blocks)
        return round(
            max(
                1 - b * (n + 2 * m + 6) / lane for b, n, m in zip(blocks, need, metas, strict=True)
            ),
            9,
        )

    candidates = range(max(need), 4 * max(need) + 1)
    assert layout.rows in candidates and layout.blocks == tuple(layout.rows // n for n in need)
    assert worst(layout.rows) == min(map(worst, candidates))
    assert all(worst(rows) > worst(layout.rows) for rows in candidates if rows < layout.rows)
    np.testing.assert_allclose(max(layout.waste()), worst(layout.rows), atol=1e-9)


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("max_len, dtype", [(65536, "uint16"), (65537, "int32")])
def test_page_bytes_are_those_of_the_arrays(names, scored: bool, max_len: int, dtype: str):
    layout = solve(names, tokens=8, max_len=max_len, scored=scored)
    pages = Pages.zeros(layout, 5)
    arrays = (pages.payload, pages.meta, pages.significance, pages.position)
    assert 5 * layout.page_bytes == sum(x.size * x.dtype.itemsize for x in arrays)
    assert layout.position_dtype == dtype and pages.position.dtype == dtype and pages.num_pages == 5
    assert layout.token_data_bytes == (4 if scored else 0) + (2 if dtype == "uint16" else 4)


@pytest.mark.parametrize("name", ["K8V8", "K8V4", "K8V2", "K4V4", "K4V2", "K4V1", "full"])
def test_side_metadata_is_at_most_14_bytes_a_token(name: str):
    """Scales, zero points, significance and position, with one group."""
    layout = solve((name,), max_len=65536)
    assert layout.token_bytes(0) - rows_of(layout.formats[0], 128) <= 14


@pytest.mark.parametrize("tier", [0, 1])
def test_split_and_join_are_inverse(tier: int):
    layout = solve(("K8V4:1,2", "K4V2:2,4"), 64, tokens=8)
    payload = (
        jnp.arange(2 * 3 * layout.rows * 8, dtype=jnp.uint32)
        .astype(jnp.uint8)
        .reshape(2, 3, layout.rows, 8)
    )
    meta = (
        jnp.arange(2 * 3 * layout.meta_rows * 8, dtype=jnp.float32)
        .astype(jnp.float16)
        .reshape(2, 3, layout.meta_rows, 8)
    )
    block = layout.split(tier, payload, meta)
    fmt, n = layout.formats[tier], layout.blocks[tier]
    shapes = [x.shape[2:] for x in block]
    assert shapes == [
        (n, rows, 8)
        for rows in (fmt.key.rows(64), fmt.value.rows(64), fmt.key.meta_rows, fmt.value.meta_rows)
    ]
    for got, wanted in zip(layout.join(tier, block, payload, meta), (payload, meta), strict=True):
        np.testing.assert_array_equal(got, wanted)
    changed = Block(*(x + 1 for x in block))
    again = layout.split(tier, *layout.join(tier, changed, payload, meta))
    for got, wanted in zip(again, changed, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_rows_that_no_block_uses_stay():
    layout = PageLayout(
        (KVFormat.parse("K8V8"), KVFormat.parse("K4V4")), 8, 4, 18, (1, 2), 8, "uint16", True
    )
    payload, meta = jnp.full((18, 4), 7, jnp.uint8), jnp.full((8, 4), 3, jnp.float16)
    zeros = Block(*(jnp.zeros_like(x) for x in layout.split(0, payload, meta)))
    new_payload, new_meta = layout.join(0, zeros, payload, meta)
    assert not new_payload[:16].any() and (new_payload[16:] == 7).all()
    assert not new_meta[:4].any() and (new_meta[4:] == 3).all()


def test_the_two_tiers_of_a_table_grow_towards_each_other():
    table = jnp.arange(10, 20)[None].repeat(2, axis=0)
    assert [page_column(0, i, 10) for i in range(3)] == [0, 1, 2] and [
        page_column(1, i, 10) for i in range(3)
    ] == [9, 8, 7]
    np.testing.assert_array_equal(
        tier_page_ids(table, 0, jnp.array([0, 3]), 2), [[10, 11], [13, 14]]
    )
    np.testing.assert_array_equal(
        tier_page_ids(table, 1, jnp.array([0, 3]), 2), [[19, 18], [16, 15]]
    )


# --- the official geometry: sizes in bytes, six segments a page ---

# bits of K and V, groups of K and V
HETERO = ((8, 4, 1, 1), (8, 4, 1, 2), (4, 2, 1, 1), (4, 2, 2, 4))
ALL = {"K8V8": (8, 8, 1, 1), "K8V2": (8, 2, 1, 1), "K4V4": (4, 4, 1, 1), "K4V1": (4, 1, 1, 1)}
SIZES = range(800, 8001, 32)


def aligned(offset: int, multiple: int) -> int:
    return -(-offset // multiple) * multiple


def segments(tier: tuple[int, ...], head_dim: int, tokens: int) -> list[int]:
    """Byte offsets of keys, key metadata, values, value metadata, scores and births, and the end.

    Starts are multiples of 32, that of the values of 128; the births follow the scores directly.
    Values are stored in pairs of tokens.
    """
    k_bits, v_bits, k_groups, v_groups = tier
    k_meta = aligned(tokens * head_dim * k_bits // 8, 32)
    values = aligned(k_meta + tokens * k_groups * 4, 128)
    v_meta = aligned(values + aligned(tokens, 2) * head_dim * v_bits // 8, 32)
    scores = aligned(v_meta + tokens * v_groups * 4, 32)
    return [0, k_meta, values, v_meta, scores, scores + 4 * tokens, scores + 8 * tokens]


def tokens_in(tier: tuple[int, ...], head_dim: int, size: int) -> int:
    """Tokens that a page of `size` bytes holds: the footprint is rounded up to a multiple of
    128.
    """
    most = size // token_bytes(tier, head_dim)
    return next(
        (n for n in range(most, 0, -1) if aligned(segments(tier, head_dim, n)[-1], 128) <= size), 0
    )


def token_bytes(tier: tuple[int, ...], head_dim: int) -> int:
    return head_dim * (tier[0] + tier[1]) // 8 + 4 * (tier[2] + tier[3]) + 8


def waste(head_dim: int, size: int) -> list[float]:
    return [
        1 - tokens_in(tier, head_dim, size) * token_bytes(tier, head_dim) / size for tier in HETERO
    ]


@pytest.mark.parametrize(
    "head_dim, size, tokens", [(128, 6784, (32, 32, 60, 52)), (64, 6144, None), (256, 5760, None)]
)
def test_official_page_size(head_dim: int, size: int, tokens: tuple[int, ...] | None):
    assert least_waste(SIZES, lambda size: waste(head_dim, size)) == size
    held = [tokens_in(tier, head_dim, size) for tier in HETERO]
    one_group = {64: (54, 96), 128: (32, 60), 256: (14, 27)}[head_dim]
    assert (held[0], held[2]) == one_group and tokens in (None, tuple(held))


def test_official_page_of_128_channels():
    assert {name: tokens_in(tier, 128, 6784) for name, tier in ALL.items()} == {
        "K8V8": 24,
        "K8V2": 37,
        "K4V4": 46,
        "K4V1": 69,
    }
    assert f"{max(waste(128, 6784)):.3%}" == "1.887%"


@pytest.mark.parametrize(
    "tier, tokens, offsets",
    [
        ((8, 4, 1, 1), 32, [0, 4096, 4224, 6272, 6400, 6528, 6656]),
        ((8, 4, 1, 2), 32, [0, 4096, 4224, 6272, 6528, 6656, 6784]),
        ((4, 2, 1, 1), 60, [0, 3840, 4096, 6016, 6272, 6512, 6752]),
        ((4, 2, 2, 4), 52, [0, 3328, 3840, 5504, 6336, 6544, 6752]),
    ],
)
def test_official_segments(tier: tuple[int, ...], tokens: int, offsets: list[int]):
    assert segments(tier, 128, tokens) == offsets


def test_least_waste_takes_the_smallest_of_equals_and_the_worst_tier():
    assert least_waste([4, 3, 2], lambda size: [0.5, 0.1]) == 2
    assert (
        least_waste([2, 3, 4], lambda size: {2: [0.0, 0.4], 3: [0.3, 0.3], 4: [0.3, 0.2]}[size])
        == 3
    )
