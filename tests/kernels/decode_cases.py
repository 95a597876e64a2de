"""A pool with rubbish outside the live tokens, kernels for it, and a dense softmax in float64."""

from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
