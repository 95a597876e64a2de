"""Decode attention over learned codecs and over keys without their rotary embedding, against
look-ups and a softmax in NumPy.
"""

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_cases import Attended, same, softmax
from implementations import IMPLEMENTATIONS, LONG, NATIVE, SLOW, crossed, marked

from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.decode_attention import Heads, Sliding, decode_attention
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.testing.random_pool import Pool, on_device, random_pool
from diffkv_jax.testing.readback import read_tier, slot_addresses, tensor_rows

SLOTS, MAX_LEN, KV_HEADS = 9, 640, 3  # of two requests
LENGTHS = [(0, 0), (0, 70), (130, 0), (33, 65), (540, 5), (1, 520)]
RECENT = [3, 0, 9, 1, 8, 0]


class Shape(NamedTuple):
    """One line of the table."""

    tiers: tuple[str, ...]
    head_dim: int
    group: int
    rope: bool = True
    first: int = 0  # position of the first token
    scored: bool = True
    tokens: int = 32
    cap: float | None = None
    window: int | None = None
    learned: str = "float16"  # dtype of the tables


CASES = {
    "CQ 4c8b, G=3": Shape(("K8v4V8v4",), 64, 3),
    "CQ 2c8b+4c8b, G=5, d=128, T=64, without rope": Shape(
        ("K8v2V8v2", "K8v4V8v4"), 128, 5, rope=False, tokens=64, learned="bfloat16"
    ),
    "CQ 8c8b, G=1, far": Shape(("K8v8V8v8",), 64, 1, first=64_000),
    "CQ of 1 to 4 bits": Shape(("K4v1V3v2", "K2v2V1v4"), 64, 2, learned="bfloat16"),
    "KVQuant of 4 bits, G=3": Shape(("K4sV4t",), 64, 3, scored=False),
    "KVQuant of 3 and 2 bits, capped": Shape(("K3sV3t", "K2sV1t"), 64, 2, cap=3.0),
    "KVQuant of 8 bits, sliding": Shape(("K8sV8t",), 32, 2, window=90, learned="bfloat16"),
    "exact sinks and KVQuant": Shape(("full", "K4sV4t"), 64, 3),
    "KVQuant of 3 bits, outliers": Shape(("K3sV3t+o5",), 64, 3, learned="bfloat16"),
    "outliers of CQ and of uniform numbers": Shape(
        ("K8v4V4:1,2+o1", "K2V2n+o3"), 64, 2, rope=False
    ),
    "CQ keys, uniform values": Shape(("K8v4V4:1,2",), 64, 2),
    "uniform and normal keys without rope": Shape(("K8V4:2,1", "K4nV2n"), 64, 3),
}


class Case:
    """Random tokens, tables and queries of one case, and the compiled kernel."""

    def __init__(self, shape: Shape, kernels: Kernels):
        self.shape, rng = shape, np.random.default_rng(4)
        self.frequencies = 10000.0 ** (-np.arange(shape.head_dim // 2) / (shape.head_dim // 2))
        self.layout = PageLayout.solve(
            tuple(KVFormat.parse(name, "bfloat16") for name in shape.tiers),
            shape.head_dim,
            tokens=shape.tokens,
            scored=shape.scored,
            meta_dtype=kernels.meta_dtype,
            rope=tuple(self.frequencies) if shape.rope else None,
        )
        lengths = [sizes[: self.layout.tiers] for sizes in LENGTHS]
        self.pool = random_pool(
            self.layout, lengths, RECENT, max_len=MAX_LEN, slots=SLOTS, seed=shape.group
        )
        self.pool.pages["position"][self.pool.pages["position"] < MAX_LEN] += shape.first
        held = np.array(
            [sum(sizes) + recent for sizes, recent in zip(lengths, RECENT, strict=True)], np.int32
        )
        self.position = held - 1 + shape.first
        self.scale = 1.5 * shape.head_dim**-0.5
        self.q = rng.normal(size=(len(LENGTHS), shape.group, shape.head_dim)).astype(np.float32)
        self.tables = tuple(
            (self._table(fmt.key, rng), self._table(fmt.value, rng)) for fmt in self.layout.formats
        )
        self._kernel = jax.jit(partial(self._attend, kernels=kernels))

    def _table(self, codec: Any, rng: np.random.Generator) -> np.ndarray | None:
        """Of two layers and the KV heads."""
        shape = codec.table_shape(self.shape.head_dim)
        return (
            None
            if shape is None
            else rng.normal(size=(2, KV_HEADS, *shape)).astype(jnp.dtype(self.shape.learned))
        )

    def _attend(self, q, pages: Pages, heads: Heads, tables, kernels: Kernels) -> tuple:
        def of_heads(table):
            of_kernels = table is None or kernels.implementation != "xla"  # they read heads.tables
            return None if of_kernels else jnp.tile(table[1], (2, *(1,) * (table.ndim - 2)))

        formats = tuple(
            dataclasses.replace(
                fmt,
                key=fmt.key.with_table(of_heads(key)),
                value=fmt.value.with_table(of_heads(value)),
            )
            for fmt, (key, value) in zip(self.layout.formats, tables, strict=True)
        )
        sliding = (
            None
            if self.shape.window is None
            else Sliding(self.shape.window, jnp.asarray(self.position))
        )
        layout, heads = (
            dataclasses.replace(self.layout, formats=formats),
            heads._replace(tables=tables),
        )
        options = dict(
            max_len=MAX_LEN,
            sm_scale=self.scale,
            logits_soft_cap=self.shape.cap,
            sliding=sliding,
            kernels=kernels,
        )
        return decode_attention(q, pages, layout, heads, **options)

    def run(self, pool: Pool | None = None, tables=None, q=None) -> Attended:
        pages, heads = on_device(self.pool if pool is None else pool, Pages, Heads)
        tables = jax.tree.map(jnp.asarray, self.tables if tables is None else tables)
        return Attended(
            *jax.device_get(self._kernel(self.q if q is None else q, pages, heads, tables))
        )

    def dense(self, q: np.ndarray | None = None, turned: bool = True) -> Attended:
        """The same from the equations; `turned`: stored keys get their rotary embedding, its angles
        rounded as the model rounds them.
        """
        pool, q = self.pool, np.asarray(self.q if q is None else q, np.float64)
        significance = pool.pages["significance"].copy()
        output, recent = np.zeros(self.q.shape), np.zeros((len(LENGTHS), SLOTS))
        for head, sizes in enumerate(pool.tier_len):
            live = int(pool.recent_len[head])
            tables = [
                [table if table is None else table[1, head % KV_HEADS] for table in tier]
                for tier in self.tables
            ]
            read = [
                read_tier(Pages(**pool.pages), self.layout, pool.page_table[head], t, n, tables[t])
                for t, n in enumerate(sizes)
            ]
            keys = [
                self._embedded(tier.k, tier.position) if turned and self.layout.rope else tier.k
                for tier in read
            ]
            k = np.concatenate([pool.recent_k[head, :live], *keys]).astype(np.float64)
            v = np.concatenate([pool.recent_v[head, :live], *(tier.v for tier in read)]).astype(
                np.float64
            )
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
                if self.shape.window is None
                else position > self.position[head] - self.shape.window
            )
            p = softmax(q[head] @ k.T * self.scale, self.shape.cap, seen)
            output[head] = p @ v
            scores = np.split(p.max(axis=0), np.cumsum([live, *sizes])[:-1])
            recent[head, :live] = scores[0]
            for tier, (n, score) in enumerate(zip(sizes, scores[1:], strict=True)):
                if self.layout.scored:
                    significance[slot_addresses(self.layout, pool.page_table[head], tier, n)] += (
                        score
                    )
        return Attended(
            output, significance, recent if self.layout.scored else np.zeros_like(recent)
        )

    def _embedded(self, k: np.ndarray, position: np.ndarray) -> np.ndarray:
        first, second = np.split(k.astype(np.float64), 2, axis=1)
        angle = position.astype(np.float32)[:, None] * self.frequencies.astype(np.float32)
        turned = (first + 1j * second) * np.exp(1j * angle.astype(np.float64))
        return np.concatenate([turned.real, turned.imag], axis=1)


@cache
def case(name: str, kernels: Kernels = XLA) -> Case:
    return Case(CASES[name], kernels)


PAIRS = crossed(
    [pytest.param(name, id=name) for name in CASES],
    marked(IMPLEMENTATIONS, mosaic_tpu=LONG, mosaic_tpu_checked=LONG),
    {
        ("CQ 4c8b, G=3", "mosaic_tpu"): (),
        ("KVQuant of 3 bits, outliers", "mosaic_tpu"): (),
        ("KVQuant of 3 bits, outliers", "mosaic_tpu_checked"): SLOW,
    },
)
SOME = marked([*IMPLEMENTATIONS[:3], *NATIVE], mosaic_tpu=LONG)


@pytest.mark.daily(9)
@pytest.mark.parametrize(("name", "kernels"), PAIRS)
def test_equals_a_dense_softmax(name: str, kernels: Kernels):
    this = case(name, kernels)
    same(this.run(), this.dense(), this.pool.pages["significance"])


def other_tables(tables, mistake: str):
    """Tables as a kernel would read them that makes a mistake."""
    if mistake == "the table of the head beside":
        return tuple(
            tuple(table if table is None else np.roll(table, 1, axis=1) for table in tier)
            for tier in tables
        )
    if mistake == "the table of the layer before":
        return tuple(
            tuple(table if table is None else table[::-1] for table in tier) for tier in tables
        )
    return tuple((value, key) for key, value in tables)


WRONG_TABLES = (
    "the table of the head beside",
    "the table of the layer before",
    "the value's table for the key",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "kernels"),
    crossed(
        [pytest.param(mistake, id=mistake) for mistake in WRONG_TABLES],
        SOME,
        {(WRONG_TABLES[0], "mosaic_tpu"): ()},
    ),
)
def test_the_comparison_sees_wrong_tables(mistake: str, kernels: Kernels):
    for name in ("CQ 4c8b, G=3", "KVQuant of 4 bits, G=3"):
        if name.startswith("KVQuant") and mistake.startswith("the value's"):
            continue  # they have other shapes
        this = case(name, kernels)
        with pytest.raises(AssertionError):
            same(
                this.run(tables=other_tables(this.tables, mistake)),
                this.dense(),
                this.pool.pages["significance"],
            )


@pytest.mark.daily(4)
@pytest.mark.parametrize("kernels", SOME)
@pytest.mark.parametrize(
    "mistake",
    ["no rope", "rope of the slots", "a token too many", "a token too few", "ranges swapped"],
)
def test_the_comparison_sees_mistakes(mistake: str, kernels: Kernels):
    this = case("KVQuant of 4 bits, G=3", kernels)
    pool, off = this.pool, (this.pool.tier_len > 0).astype(np.int32)
    slots = {
        **pool.pages,
        "position": np.broadcast_to(np.arange(32, dtype=np.uint16), pool.pages["position"].shape),
    }
    bad = {
        "no rope": pool,
        "rope of the slots": pool._replace(pages=slots),
        "a token too many": pool._replace(tier_len=pool.tier_len + off),
        "a token too few": pool._replace(tier_len=pool.tier_len - off),
        "ranges swapped": pool._replace(pages={**pool.pages, "meta": pool.pages["meta"][:, ::-1]}),
    }[mistake]
    with pytest.raises(AssertionError):
        same(this.run(bad), this.dense(turned=mistake != "no rope"), pool.pages["significance"])


@pytest.mark.daily(5)
@pytest.mark.parametrize("kernels", SOME)
@pytest.mark.parametrize("part", ["payload", "meta"])  # channels, values
@pytest.mark.parametrize("tensor", [0, 1])  # K, V
def test_the_comparison_sees_exchanged_outliers(tensor: int, part: str, kernels: Kernels):
    this = case("KVQuant of 3 bits, outliers", kernels)
    name, first, rows = tensor_rows(this.layout, 0)[tensor + 2 * (part == "meta")]
    array = this.pool.pages[name].copy()
    array[:, first + rows - 2 : first + rows] = array[:, first + rows - 2 : first + rows][:, ::-1]
    with pytest.raises(AssertionError):
        same(
            this.run(this.pool._replace(pages={**this.pool.pages, name: array})),
            this.dense(),
            this.pool.pages["significance"],
        )


@pytest.mark.parametrize("kernels", marked([*IMPLEMENTATIONS[1:3], *NATIVE], mosaic_tpu=LONG))
@pytest.mark.parametrize("name", ["CQ 4c8b, G=3", "KVQuant of 4 bits, G=3"])
def test_bfloat16_queries(name: str, kernels: Kernels):
    """Pallas kernels round what they have looked up to bfloat16; another head's table is further
    away than that. Native code does not.
    """
    this = case(name, kernels)
    q = jnp.asarray(this.q, jnp.bfloat16)
    wanted = this.dense(np.asarray(q, np.float32)).output
    assert np.abs(this.run(q=q).output - wanted).max() < (
        1e-4 if kernels.implementation == "cpu" else 0.03
    )
    beside = other_tables(this.tables, "the table of the head beside")
    assert np.abs(this.run(tables=beside, q=q).output - wanted).max() > 0.3


@pytest.mark.parametrize("kernels", NATIVE)
@pytest.mark.parametrize("mistake", ["too few rows", "too few layers", "too many heads"])
def test_tables_that_lead_out_of_an_array_are_refused(mistake: str, kernels: Kernels):
    this = case("CQ 4c8b, G=3", kernels)
    ((keys, values),) = this.tables
    bad = {
        "too few rows": keys[:, :, :-1],
        "too few layers": keys[:1],
        "too many heads": np.concatenate([keys, keys[:, :1]], axis=1),
    }[mistake]
    pages, heads = on_device(this.pool, Pages, Heads)
    heads = heads._replace(tables=((jnp.asarray(bad), jnp.asarray(values)),))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="learned tables"):
        jax.block_until_ready(
            decode_attention(
                this.q, pages, this.layout, heads, max_len=MAX_LEN, sm_scale=1.0, kernels=kernels
            )
        )
