"""diffkv_jax as a system of `benchmarks peers`, and copies of a prefilled request in one cache.

A batch is R copies of one prefilled request: their pages are copied, none is shared. Reading and
compressing them costs what R different requests with the same shares of the tiers would.
"""

import dataclasses
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import diffkv_jax as dkv
from benchmarks.peers.systems import Decoded, Place
from diffkv_jax.cache.cache import complete, empty_cache, without_empty
from diffkv_jax.cache.pool_size import cache_bytes, tree_bytes
from diffkv_jax.evaluation import teacher_forced
from diffkv_jax.models import load_pretrained
from diffkv_jax.pallas_kernels.apply_event import FreeRing, Stored
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.policy.stage import with_leaves
from diffkv_jax.read_prompts import prefill
from diffkv_jax.steps.jitted import decode_step
from diffkv_jax.units import parse_bytes

CHUNK = 1024  # of a prompt: the default of `generate`


class Ours:
    """One policy: "none", "diffkv" with `alphas`, or the name of a format."""

    def __init__(
        self,
        place: Place,
        policy: str,
        alphas: tuple[float, float] = (1.0, 0.0),
        implementation: str | None = None,
        dtype: str = "bfloat16",
        loaded: tuple[Any, Any] | None = None,
    ):
        named = {"none": dkv.CompressionPolicy.none, "diffkv": partial(dkv.diffkv, *alphas)}
        self.policy = named.get(policy, partial(dkv.quantized, policy))()
        self.kernels = Kernels.resolve(implementation)
        self.named = implementation
        self.model, self.params = loaded or load_pretrained(place.gguf, dtype)[:2]
        self.kept: dkv.KVCache | None = None
        self.first = 0

    def prefill(self, tokens: np.ndarray) -> float:
        """All prompts as one batch, in chunks, in a cache with room for every token in the highest
        tier.
        """
        began = time.perf_counter()
        self._prompt(tokens)
        return time.perf_counter() - began

    def keep(self, tokens: np.ndarray) -> None:
        """As `prefill` of one prompt."""
        self.kept = None  # its memory first
        first, self.kept = self._prompt(tokens[None])
        self.first = int(first[0])

    def _prompt(self, tokens: np.ndarray) -> tuple[np.ndarray, dkv.KVCache]:
        """The first token of each prompt [R, N], and their cache."""
        requests, length = tokens.shape
        room = min(
            -(-(length + 1) // 128) * 128 + 128, self.model.attention.max_position_embeddings
        )
        exact = {"max_len": room, "cache_dtype": _exact(self.model), "kernels": self.kernels}
        cache = dkv.make_cache(self.model, self.policy, [length] * requests, **exact)
        logits, cache = prefill(
            self.model,
            self.params,
            cache,
            tokens,
            np.full(requests, length, np.int32),
            min(CHUNK, _power(length)),
        )
        return np.asarray(logits.argmax(axis=-1)), jax.block_until_ready(cache)

    def decode(self, batch: int, steps: int, budget: int | str | None = None) -> Decoded:
        """Greedy steps from copies of the kept request; the pool is what `budget` buys, or just
        enough for these steps.
        """
        assert self.kept is not None, "keep a prompt first"
        if budget is not None and batch > self.fits(budget, steps):
            raise ValueError(f"{batch} requests and {steps} steps do not fit {budget}")
        cache = replicate(self.kept, batch, spare_pages(self.kept, steps))
        nbytes = tree_bytes(cache)
        token = jnp.full(batch, self.first, jnp.int32)
        began = time.perf_counter()
        out, cache = _decode(self.model, self.params, cache, token, steps)
        jax.block_until_ready((out, cache))
        seconds = time.perf_counter() - began
        if np.asarray(cache.counters.overflow).any():
            raise RuntimeError("the pool ran out of pages")
        return Decoded(seconds, nbytes)

    def fits(self, budget: int | str, steps: int) -> int:
        """How many copies of the kept request, each with `steps` more tokens, a cache of so many
        bytes holds.
        """
        kept = self.kept
        assert kept is not None, "keep a prompt first"
        amount, requests = parse_bytes(budget), 0
        need = len(used_pages(kept)) + spare_pages(kept, steps)

        def size(requests: int) -> int:
            spec = _sized(kept, requests, requests * need)
            return cache_bytes(spec, _repeated(kept.policy, requests))

        while size(requests + 1) <= amount:
            requests += 1
        return requests

    def shares(self) -> dict[str, float]:
        """Of the kept request: parts of its tokens in each tier, the recent window and dropped, and
        bytes of a bfloat16 cache.
        """
        assert self.kept is not None, "keep a prompt first"
        report = dkv.memory_report(self.kept)
        kept = dict(
            zip((*report.tier_names, "recent"), map(float, report.kept_fraction), strict=True)
        )
        return kept | {
            "dropped": 1.0 - sum(kept.values()),
            "of bf16": report.allocated / report.bf16,
        }

    def teacher_forced(self, tokens: np.ndarray, context: int) -> np.ndarray:
        """`diffkv_jax.teacher_forced`, on the kernels of the platform."""
        if self.named is not None:
            raise NotImplementedError("quality is measured with the kernels of the platform only")
        log_probs, _ = teacher_forced(
            self.model,
            self.params,
            tokens[None],
            context,
            self.policy,
            cache_dtype=_exact(self.model),
            prefill_chunk=CHUNK,
        )
        return log_probs[0]


def _exact(model: Any) -> str:
    """dtype of exact tokens: the model's own."""
    return model.attention.dtype


def _power(length: int) -> int:
    """The power of two that holds a prompt, at least 64: the last chunk must hold the observing
    queries.
    """
    return max(64, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnames=("model", "steps"), donate_argnames="cache")
def _decode(
    model: Any, params: Any, cache: dkv.KVCache, token: Array, steps: int
) -> tuple[Array, dkv.KVCache]:
    """Feed, take the best token, feed it ...: the tokens int32 [steps, R] and the cache. No host
    read.
    """

    def step(state, _):
        cache, token = state
        logits, cache = decode_step(model, params, cache, token, ~cache.counters.overflow)
        token = logits.argmax(axis=-1).astype(jnp.int32)
        return (cache, token), token

    (cache, _), out = lax.scan(step, (cache, token), length=steps)
    return out, cache


def used_pages(cache: dkv.KVCache) -> np.ndarray:
    """Ids of the pages that requests own, ascending."""
    table = np.asarray(cache.stored.page_table)
    return np.unique(table[table < cache.spec.num_pages])


def spare_pages(cache: dkv.KVCache, steps: int) -> int:
    """Pages that a request may need beyond those it has to take `steps` more tokens, all of them in
    the highest tier.
    """
    spec = cache.spec
    heads = len(spec.paged_layers) * spec.attention.num_kv_heads
    return heads * (spec.layout.pages_for(0, steps + spec.flush) + spec.layout.tiers)


def _repeated(policy: dkv.CompressionPolicy, requests: int) -> dkv.CompressionPolicy:
    """A bound policy of one request for several."""
    keep = jax.tree.map(lambda x: np.repeat(np.asarray(x), requests, axis=1), policy.keep)
    return with_leaves(policy, keep=keep)


def _sized(source: dkv.KVCache, requests: int, num_pages: int) -> dkv.CacheSpec:
    return dataclasses.replace(source.spec, num_requests=requests, num_pages=num_pages)


def replicate(source: dkv.KVCache, requests: int, spare: int) -> dkv.KVCache:
    """A cache of `requests` copies of a cache's only request, each with `spare` free pages beside
    its own.
    """
    if source.spec.num_requests != 1:
        raise ValueError(f"the cache must hold one request, given {source.spec.num_requests}")
    source, used = complete(source), used_pages(source)
    spec = _sized(source, requests, max(1, requests * (len(used) + spare)))
    new = complete(
        jax.jit(empty_cache, static_argnames="spec")(spec, _repeated(source.policy, requests))
    )
    pages, table = new.stored.pages, np.full(new.stored.page_table.shape, spec.num_pages, np.int32)
    renamed = np.full(source.spec.num_pages + 1, spec.num_pages, np.int32)
    for row in range(requests):
        renamed[used] = np.arange(row * len(used), (row + 1) * len(used))
        table[:, row] = renamed[np.asarray(source.stored.page_table)[:, 0]]
        pages = _copy_pages(pages, source.stored.pages, jnp.asarray(used), row * len(used))
    taken = requests * len(used)
    tier_len, recent, sliding = jax.tree.map(
        partial(jnp.repeat, repeats=requests, axis=1),
        (source.stored.tier_len, source.recent, source.sliding),
    )
    counters = jax.tree.map(partial(jnp.repeat, repeats=requests, axis=0), source.counters)
    ring = FreeRing(
        new.stored.ring.ids, jnp.int32(taken % spec.num_pages), jnp.int32(spec.num_pages - taken)
    )
    stored = Stored(pages, ring, jnp.asarray(table), tier_len)
    cache = dataclasses.replace(
        new, stored=stored, recent=recent, sliding=sliding, counters=counters
    )
    return without_empty(jax.block_until_ready(cache))


@partial(jax.jit, donate_argnums=0)
def _copy_pages(pages: Any, source: Any, ids: Array, first: int | Array) -> Any:
    """Pages `ids` of `source` at `first` and after it, in place."""
    return jax.tree.map(
        lambda into, x: lax.dynamic_update_slice_in_dim(into, x[ids], first, axis=0), pages, source
    )
