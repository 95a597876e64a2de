"""A pool, a chunk of prompts and kernels for them, beside attention and column sums in float64
NumPy.
"""

from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import IMPLEMENTATIONS

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
                attention_and_sums,
                layout=self.layout,
                observe=self.observe,
                scale=self.scale,
                kernels=kernels,
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


def attention_and_sums(
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
