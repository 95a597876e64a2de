"""The operations whose traffic `benchmarks roofline` counts, at the shapes of real models:
arguments, and the bytes that must move.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffkv_jax.pallas_kernels.codecs import KVFormat
from diffkv_jax.pallas_kernels.decode_attention import Heads, decode_attention
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.pallas_kernels.prefill_attention.api import column_sums, prefill_attention
from diffkv_jax.pallas_kernels.prefill_attention.reference import Chunk, Scale
from diffkv_jax.pallas_kernels.recent_window.api import append_recent

WINDOW, FLUSH, CHUNK, OBSERVE = 64, 32, 1024, 64
# of the recent window; live ones on the average between two events
SLOTS, LIVE = WINDOW + FLUSH, WINDOW + FLUSH // 2
BF16 = jnp.bfloat16


def unknown(*shape: int, dtype=BF16) -> Any:
    """An argument of which only shape and dtype are given."""
    return jax.ShapeDtypeStruct(shape, dtype)


@dataclass(frozen=True)
class Model:
    """Attention shapes of a model."""

    name: str
    layers: int
    kv_heads: int
    group: int
    head_dim: int


@dataclass(frozen=True)
class Mix:
    """How much of the context each tier holds; the rest has been dropped."""

    name: str
    formats: tuple[str, ...]
    shares: tuple[float, ...]

    @property
    def scored(self) -> bool:
        """Whether the policy scores."""
        return self.formats != ("full",)


MODELS = (Model("Llama-3-8B", 32, 8, 4, 128), Model("SmolLM2-135M", 30, 3, 3, 64))
TIERS = ("K8V4", "K4V2")
PLAIN = Mix("bf16 pages, no policy", ("full",), (1.0,))
MIXES = (
    Mix("all high", TIERS, (1.0, 0.0)),
    Mix("half high, half low", TIERS, (0.5, 0.5)),
    Mix("60 % high, 30 % low, 10 % dropped", TIERS, (0.6, 0.3)),
    PLAIN,
)


@dataclass(frozen=True)
class Case:
    """One operation on one layer: the function, its arguments (NumPy: known), and the bytes that it
    must move, by operand.
    """

    operation: str
    function: Callable
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    must: dict[str, float]
    per_step: float = 1.0  # how often a decode step does it

    @property
    def must_bytes(self) -> float:
        """All bytes that must move."""
        return sum(self.must.values())


@dataclass(frozen=True)
class Setting:
    """A batch of requests of equal length; every head holds the same number of tokens."""

    model: Model
    mix: Mix
    context: int
    batch: int
    implementation: str

    @property
    def kernels(self) -> Kernels:
        """The implementation."""
        return Kernels(self.implementation)

    @property
    def layout(self) -> PageLayout:
        """The pages' layout."""
        formats = [KVFormat.parse(name) for name in self.mix.formats]
        d, tokens = self.model.head_dim, self.kernels.tokens_per_block
        max_len, meta = self.context + CHUNK, self.kernels.meta_dtype
        return PageLayout.solve(
            formats, d, tokens=tokens, max_len=max_len, scored=self.mix.scored, meta_dtype=meta
        )

    @property
    def heads(self) -> int:
        """Heads of one layer: requests times KV heads."""
        return self.batch * self.model.kv_heads

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each tier of a head."""
        return tuple(round(share * (self.context - LIVE)) for share in self.mix.shares)

    @property
    def max_pages(self) -> int:
        """Columns of the page table."""
        return self.layout.pages_for(0, self.context + CHUNK)

    def pages_of_head(self) -> tuple[int, ...]:
        """Pages that each tier of a head takes."""
        return tuple(self.layout.pages_for(t, n) for t, n in enumerate(self.lengths))

    def tables(self) -> tuple[Any, Any]:
        """Page table (rubbish where there is no page) and lengths."""
        table = np.full((self.heads, self.max_pages), 10**6, np.int32)
        high, low = (*self.pages_of_head(), 0)[:2]
        ids = np.arange(self.heads * (high + low), dtype=np.int32).reshape(self.heads, high + low)
        table[:, :high] = ids[:, :high]
        table[:, self.max_pages - low :] = ids[:, high:][:, ::-1]
        return table, np.tile(np.array(self.lengths, np.int32), (self.heads, 1))

    def pool(self) -> Pages:
        """The pool of all layers, a quarter of it free: shapes."""
        pages = self.model.layers * self.heads * sum(self.pages_of_head()) * 4 // 3
        size = pages * self.layout.rows * self.layout.tokens
        pages *= 2 if 2 << 30 <= size < 4 << 30 else 1  # sizes that the Triton kernels refuse
        return jax.eval_shape(lambda: Pages.zeros(self.layout, pages))

    def held(self) -> Heads:
        """What the heads of a layer in the middle hold."""
        window = unknown(self.model.layers, self.heads, SLOTS, self.model.head_dim)
        layer: Any = np.array(self.model.layers // 2, np.int32)
        length: Any = np.full(self.heads, LIVE, np.int32)
        return Heads(*self.tables(), window, window, length, layer)

    def bytes_of(self, tier: int, tensors: str = "kv") -> int:
        """Payload and metadata bytes of one token of a tier."""
        fmt, d = self.layout.formats[tier], self.model.head_dim
        codecs = [codec for name, codec in (("k", fmt.key), ("v", fmt.value)) if name in tensors]
        return sum(codec.rows(d) + 2 * codec.meta_rows for codec in codecs)

    def stored_must(self, tensors: str = "kv") -> dict[str, float]:
        """Live tokens' payload and metadata once, their significance in and out where scored, page
        ids and lengths.
        """
        n, layout, d = self.heads, self.layout, self.model.head_dim
        must = {"pages.payload": 0.0, "pages.meta": 0.0}
        for tier, length in enumerate(self.lengths):
            fmt = layout.formats[tier]
            codecs = [
                codec for name, codec in (("k", fmt.key), ("v", fmt.value)) if name in tensors
            ]
            must["pages.payload"] += n * length * sum(codec.rows(d) for codec in codecs)
            must["pages.meta"] += n * length * sum(2 * codec.meta_rows for codec in codecs)
        must["pages.significance"] = 8.0 * n * sum(self.lengths) if layout.scored else 0.0
        must["heads.page_table"] = 4.0 * n * sum(self.pages_of_head())
        must["heads.tier_len"] = 4.0 * n * layout.tiers
        must["heads.recent_len"] = 4.0 * n
        must["heads.layer"] = 4.0
        for tensor in tensors:
            must[f"heads.recent_{tensor}"] = 2.0 * n * LIVE * d
        return must


def decode_case(s: Setting) -> Case:
    """Decode attention with the significance it gives."""
    m = s.model
    q, max_len, sm_scale = (
        unknown(s.heads, m.group, m.head_dim),
        s.context + CHUNK,
        m.head_dim**-0.5,
    )

    def decode(q, pages, heads):
        return decode_attention(
            q, pages, s.layout, heads, max_len=max_len, sm_scale=sm_scale, kernels=s.kernels
        )

    must = s.stored_must() | {
        "q": 2.0 * prod(q.shape),
        "output": 4.0 * prod(q.shape),
        "recent scores": 4.0 * s.heads * SLOTS,
    }
    return Case("decode attention", decode, (q, s.pool(), s.held()), (1,), must)


def append_case(s: Setting) -> Case:
    """One token into the recent window."""
    heads, token = s.held(), unknown(s.heads, s.model.head_dim)
    window = {"k": heads.recent_k, "v": heads.recent_v}

    def append(recent_k, recent_v, layer, k, v, slot):
        return append_recent(recent_k, recent_v, layer, k, v, slot, kernels=s.kernels)

    must = {name: 2.0 * prod(token.shape) for name in ("k", "v", "recent_k", "recent_v")} | {
        "slot": 4.0 * s.heads,
        "layer": 4.0,
    }
    slot = np.full(s.heads, LIVE, np.int32)
    return Case(
        "append", append, (window["k"], window["v"], heads.layer, token, token, slot), (0, 1), must
    )


def _chunk(s: Setting) -> Chunk:
    m = s.model
    length: Any = np.full(s.heads, CHUNK, np.int32)
    k = unknown(s.heads, CHUNK, m.head_dim)
    return Chunk(unknown(s.heads, m.group, CHUNK, m.head_dim), k, k, length)


def prefill_case(s: Setting) -> Case:
    """A chunk of a prompt over what is stored."""
    chunk, m = _chunk(s), s.model

    def prefill(chunk, pages, heads):
        return prefill_attention(
            chunk, pages, s.layout, heads, Scale(m.head_dim**-0.5, None), kernels=s.kernels
        )

    rows = s.heads * m.group * CHUNK
    must = s.stored_must() | {
        "pages.significance": 0.0,
        "chunk.q": 2.0 * rows * m.head_dim,
        "chunk.length": 4.0 * s.heads,
    }
    must |= {f"chunk.{name}": 2.0 * s.heads * CHUNK * m.head_dim for name in "kv"}
    must |= {"output": 4.0 * rows * m.head_dim, "log-sum-exp": 4.0 * rows}
    return Case("prefill chunk", prefill, (chunk, s.pool(), s.held()), (), must, 0.0)


def sums_case(s: Setting) -> Case:
    """Column sums of the last rows of a chunk."""
    chunk, m = _chunk(s), s.model
    lse = unknown(s.heads, m.group, CHUNK, dtype=jnp.float32)

    def sums(chunk, lse, pages, heads):
        return column_sums(
            chunk,
            lse,
            OBSERVE,
            pages,
            s.layout,
            heads,
            Scale(m.head_dim**-0.5, None),
            kernels=s.kernels,
        )

    rows = s.heads * m.group * OBSERVE
    must = s.stored_must("k") | {
        "chunk.q": 2.0 * rows * m.head_dim,
        "lse": 4.0 * rows,
        "chunk.length": 4.0 * s.heads,
    }
    must |= {
        "chunk.k": 2.0 * s.heads * CHUNK * m.head_dim,
        "sums of the window and chunk": 4.0 * s.heads * (SLOTS + CHUNK),
    }
    return Case("column sums", sums, (chunk, lse, s.pool(), s.held()), (2,), must, 0.0)
