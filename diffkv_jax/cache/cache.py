"""`KVCache`: the whole compressed cache as one immutable pytree, and `CacheSpec`, its static
description.
"""

import logging
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.arguments import instance, integer, one_of
from diffkv_jax.cache.layout import layout_of
from diffkv_jax.cache.query_counts import nothing_observed
from diffkv_jax.methods.query_statistics import QueryStatistics, no_queries
from diffkv_jax.model import AttentionSpec
from diffkv_jax.pallas_kernels.apply_event import APPLY_EVENT, FreeRing
from diffkv_jax.pallas_kernels.codecs import Codec
from diffkv_jax.pallas_kernels.codecs.full import DTYPES
from diffkv_jax.pallas_kernels.decode_attention import DECODE_ATTENTION
from diffkv_jax.pallas_kernels.dispatch import XLA, Kernels
from diffkv_jax.pallas_kernels.pages import PageLayout, Pages
from diffkv_jax.policy.checks import check_lengths
from diffkv_jax.policy.pairs import Merge
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.selection import Selection

Table = Array | np.ndarray | None
# of K and V in each tier, None where the codec learns nothing
Tables = tuple[tuple[Table, Table], ...]


@dataclass(frozen=True)
class CacheSpec:
    """Everything about a cache that the compiler must know. Thresholds and budgets are not here:
    they are arrays of the cache.
    """

    attention: AttentionSpec
    layout: PageLayout
    num_requests: int
    max_len: int
    num_pages: int
    window: int
    flush: int
    selection: Selection
    dtype: str
    kernels: Kernels = XLA
    rotate: bool = False
    merge: Merge | None = None  # None when no pair of layers is merged

    @staticmethod
    def build(
        attention: AttentionSpec,
        policy: CompressionPolicy,
        *,
        num_requests: int,
        max_len: int,
        num_pages: int,
        dtype: str,
        tokens: int | None = None,
        kernels: Kernels = XLA,
    ) -> "CacheSpec":
        """The spec of a cache for `num_requests` sequences of up to `max_len` tokens.

        `kernels` run its operations; `tokens` are the lanes of a page, what the kernels want when
        None.

        Raises:
            TypeError: an argument is of another type.
            ValueError: a number is outside its range, `dtype` is not one that exact tokens can be
                kept in, the tiers do not fit one page shape, the kernels do not know them, the
                model does not tell its rotary embedding and the policy removes it, from keys or
                from queries, it has a latent and a tier keeps K and V differently, its context is
                too short, or its layers cannot be merged.
        """
        instance("attention", attention, AttentionSpec, "a model has one as .attention")
        instance("policy", policy, CompressionPolicy, "diffkv_jax.load_policy makes one of a name")
        instance(
            "kernels",
            kernels,
            Kernels,
            "diffkv_jax.pallas_kernels.dispatch.Kernels.resolve(...) makes one",
        )
        num_requests, max_len = (
            integer("num_requests", num_requests, least=1),
            integer("max_len", max_len, least=1),
        )
        num_pages, tokens = (
            integer("num_pages", num_pages, least=0),
            integer("tokens", tokens, least=1, optional=True),
        )
        # also where no tier keeps exact tokens: the recent window does
        dtype = one_of("dtype", dtype, DTYPES)
        check_lengths(policy, attention.max_position_embeddings)
        selection = policy.selection
        try:
            merge, layout = layout_of(
                attention, policy, max_len=max_len, dtype=dtype, tokens=tokens, kernels=kernels
            )
        except ValueError as error:
            raise ValueError(f"policy {policy.name!r} with tiers={policy.tiers}: {error}") from None
        if selection.nested and any(window is not None for window in attention.sliding_windows):
            raise ValueError(
                f"policy {policy.name!r}: nested=True needs a model without sliding-window "
                f"layers, which would see dropped tokens"
            )
        if kernels.implementation != "xla" and _unsupported(policy, layout, kernels):
            raise ValueError(
                f"policy {policy.name!r} runs in plain XLA only, not on "
                f"{kernels.implementation!r} kernels: leave it to 'xla'"
            )
        if selection.score == "expected" and attention.rope is None:
            raise ValueError(
                f"policy {policy.name!r} ranks by queries without their rotary embedding, "
                "and the model does not tell it (AttentionSpec.rope)"
            )
        schedule = (policy.window, policy.flush, selection)
        return CacheSpec(
            attention,
            layout,
            num_requests,
            max_len,
            num_pages,
            *schedule,
            dtype,
            kernels,
            policy.rotate,
            merge,
        )

    @property
    def event_kernels(self) -> Kernels:
        """What runs events, which take all layers at once on kernels."""
        return APPLY_EVENT.chosen(self.kernels, self.layout)

    @cached_property
    def paged_layers(self) -> tuple[int, ...]:
        """Layers with global attention, whose tokens are compressed in pages."""
        return tuple(i for i, window in enumerate(self.attention.sliding_windows) if window is None)

    @cached_property
    def window_layers(self) -> tuple[int, ...]:
        """Layers with a sliding window, which keep their own full-precision ring."""
        return tuple(
            i for i, window in enumerate(self.attention.sliding_windows) if window is not None
        )

    @cached_property
    def pairs(self) -> int:
        """Pairs of merged layers: the last of the paged ones."""
        return 0 if self.merge is None else self.merge.pairs(self.attention)

    @property
    def unmerged_layers(self) -> int:
        """How many of the paged layers, the first ones, are not merged."""
        return len(self.paged_layers) - 2 * self.pairs

    @property
    def unmerged(self) -> "CacheSpec":
        """What holds for layers that are not merged: pages have no tier for what two layers share,
        the last one.
        """
        if self.merge is None:
            return self
        layout = self.layout
        return replace(
            self, layout=replace(layout, formats=layout.formats[:-1], blocks=layout.blocks[:-1])
        )

    @property
    def ring_len(self) -> int:
        """Tokens that the ring of a sliding-window layer holds."""
        return min(
            max((w for w in self.attention.sliding_windows if w is not None), default=0),
            self.max_len,
        )

    @property
    def max_pages(self) -> int:
        """Width of a head's page table: every token in the high tier and one part-filled page of
        each other tier.
        """
        return self.layout.pages_for(0, self.max_len) + self.layout.tiers

    def staying(self, count):
        """Tokens of `count` (ints or arrays), those in the recent window and new ones, that stay
        exact: the window and no whole block.
        """
        beyond, group = count - self.window, self.layout.tokens_per_group
        return count - beyond * (beyond > 0) // group * group

    @property
    def one_victim(self) -> bool:
        """Whether an event in decode re-examines one token at most (Algorithm 1 of the DiffKV
        paper).
        """
        return self.flush == 1 and not self.selection.budgeted and not self.selection.profiled

    @property
    def num_heads(self) -> int:
        """Heads of one layer that own pages: requests x KV heads."""
        return self.num_requests * self.attention.num_kv_heads


def kernels_for(
    policy: CompressionPolicy,
    attention: AttentionSpec,
    implementation: str | None = None,
    *,
    interpret: bool = False,
) -> Kernels:
    """The kernels asked for, or those of the platform; plain XLA where only it can do what policy
    and model ask for.

    The log says so, and also where of the kernels only decode attention can.

    Raises:
        ValueError: the kernels asked for cannot run here, or do not know what policy and model ask
            for.
    """
    kernels = Kernels.resolve(implementation, interpret=interpret)
    if kernels.implementation == "xla":
        return kernels
    try:
        _, layout = layout_of(
            attention, policy, max_len=1, dtype=attention.dtype, tokens=None, kernels=kernels
        )
    except ValueError:  # `CacheSpec.build` says it
        return kernels
    log = logging.getLogger(__name__)
    reason = _unsupported(policy, layout, kernels)
    if reason is None and APPLY_EVENT.supports(kernels.implementation, layout):
        log.info(
            "policy %r: decode attention runs on %r, prefill attention and events in plain XLA",
            policy.name,
            kernels.implementation,
        )
    if reason is None:
        return kernels
    if implementation is not None:
        raise ValueError(
            f"policy {policy.name!r} runs in plain XLA only: leave "
            f"implementation={implementation!r} out or take 'xla'"
        )
    log.info("policy %r runs in plain XLA: %s", policy.name, reason)
    return XLA


def _unsupported(policy: CompressionPolicy, layout: PageLayout, kernels: Kernels) -> str | None:
    """Why no operation of the kernels can work on a policy's pages; None where decode attention can
    at least.
    """
    if policy.block is not None:
        return f"block={policy.block} is no size of block that the kernels choose"
    return DECODE_ATTENTION.supports(kernels.implementation, layout)


class Waiting(NamedTuple):
    """Recent window and prompt chunk of the layer before, which wait for the layer they are merged
    with; n = window + flush + C.
    """

    k: Array  # [B, n, head_dim] cache dtype
    v: Array  # [B, n, head_dim]


@dataclass(frozen=True)
class KVCache:
    """The compressed cache of a batch. Changed only by pure functions under `jax.jit`; donate it to
    have it updated in place.

    Axes: L paged layers, S sliding-window layers, R requests, K KV heads, N = window + flush recent
    slots. An array that would have no element, such as the rings of a model without sliding
    windows, is None: checkpoints cannot hold empty arrays. Within a step all arrays are there
    (`complete`).
    """

    spec: CacheSpec = field(metadata={"static": True})
    pages: Pages  # the pool, shared by all layers, heads and requests
    ring: FreeRing  # ids of the pages that nobody owns
    # int32 [L, R, K, max_pages]; tier 0 grows from the left, the other one of a layer from the
    # right; num_pages = none
    page_table: Array
    tier_len: Array  # int32 [L, R, K, tiers] tokens
    # bool [R, C] while a chunk of C tokens is read by a policy that nests: not dropped in a layer
    # so far; else absent
    present: Array
    # int32 [L, R, K] the policy of each head, one of `HEAD_POLICIES`; absent unless heads choose
    choice: Array
    # float32 [L, R, K, 2] (high, low): thresholds in units of 1 / seq_len, budgets (high, any), or
    # shares to recover
    limits: Array
    recent_k: Array  # [L, R, K, N, head_dim] cache dtype, oldest first
    recent_v: Array  # [L, R, K, N, head_dim]; absent with `AttentionSpec.latent`, as is ring_v
    recent_significance: Array  # float32 [L, R, K, N]; absent when the policy does not score
    ring_k: Array  # [S, R, K, ring_len, head_dim]; position p lies in slot p % ring_len
    ring_v: Array  # [S, R, K, ring_len, head_dim]
    # uint8 [R, max_len] class of the token at each position; absent unless the policy names token
    # ids
    classes: Array
    seq_len: Array  # int32 [R] tokens seen
    recent_len: Array  # int32 [R] tokens in the recent slots
    # int32 [R, spans, 2] (end, length) of the spans of positions whose queries have scored
    observed: Array
    overflow: Array  # bool [R] the pool could not give this request a page
    steps: Array  # int32 [R] decode steps since the last prompt
    pending: Array  # int32 [R] token sampled last and not yet seen by the model, -1 = none
    # uint8 [32] of the parameters that made it (`diffkv_jax.calibration.calibration`), zeros = not
    # told
    fingerprint: Array
    queries: QueryStatistics | None  # of the prompts' queries, where the policy ranks by them
    tables: Tables  # float16 or bfloat16 [L, K, ...] what learned codecs have learned
    waiting: Waiting | None = None  # in a prompt chunk of a policy that merges layers

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"KVCache(num_requests={spec.num_requests}, max_len={spec.max_len}, "
            f"num_pages={spec.num_pages}, dtype={spec.dtype!r})"
        )


jax.tree_util.register_dataclass(
    KVCache, data_fields=[f.name for f in fields(KVCache) if f.name != "spec"], meta_fields=["spec"]
)


def table_shapes(spec: CacheSpec) -> tuple[tuple[tuple[int, ...] | None, ...], ...]:
    """Shapes of `KVCache.tables`."""
    attention = spec.attention
    heads = (len(spec.paged_layers), attention.num_kv_heads)

    def of(codec: Codec, width: int) -> tuple[int, ...] | None:
        shape = codec.table_shape(width)
        return shape and (*heads, *shape)

    formats = ((fmt, *fmt.widths(attention.head_dim)) for fmt in spec.layout.formats)
    return tuple((of(fmt.key, first), of(fmt.value, second)) for fmt, first, second in formats)


def empty_cache(
    spec: CacheSpec, limits: np.ndarray | Array, tables: Tables | None = None
) -> KVCache:
    """A cache without tokens; every page is zeroed and free.

    `limits` float32 [paged layers, requests, kv_heads, 2]; `tables` of the shapes
    `table_shapes(spec)`, zeros when None: good to count.
    """
    return without_empty(_all_arrays(spec, limits, tables))


def without_empty(cache: KVCache) -> KVCache:
    """The cache with None for each array that has no element."""
    return jax.tree.map(lambda array: array if array.size else None, cache)


def complete(cache: KVCache) -> KVCache:
    """Inverse of `without_empty`: every array is there, as steps and kernels want it. Under jit the
    empty ones cost nothing.
    """
    spec = cache.spec
    limits = jax.ShapeDtypeStruct(
        (len(spec.paged_layers), spec.num_requests, spec.attention.num_kv_heads, 2), jnp.float32
    )
    whole = jax.eval_shape(partial(_all_arrays, spec), limits)

    def there(array: Array | None, shape: jax.ShapeDtypeStruct | None) -> Array | None:
        return jnp.zeros(shape.shape, shape.dtype) if array is None and shape is not None else array

    return jax.tree.map(there, cache, whole, is_leaf=lambda x: x is None)


def _all_arrays(
    spec: CacheSpec, limits: np.ndarray | Array, tables: Tables | None = None
) -> KVCache:
    """`empty_cache` with the arrays that have no element."""
    if tables is None:
        tables = tuple((_zeros(key), _zeros(value)) for key, value in table_shapes(spec))
    paged, windowed = len(spec.paged_layers), len(spec.window_layers)
    heads = (spec.num_requests, spec.attention.num_kv_heads)
    head_dim, slots = spec.attention.head_dim, spec.window + spec.flush
    value_dim = head_dim if spec.attention.latent is None else 0
    zeros = partial(jnp.zeros, dtype=spec.dtype)
    counter = jnp.zeros(spec.num_requests, jnp.int32)
    return KVCache(
        spec=spec,
        pages=Pages.zeros(spec.layout, spec.num_pages),
        ring=FreeRing.full(spec.num_pages),
        page_table=jnp.full((paged, *heads, spec.max_pages), spec.num_pages, jnp.int32),
        tier_len=jnp.zeros((paged, *heads, spec.layout.tiers), jnp.int32),
        present=jnp.zeros((spec.num_requests, 0), bool),
        choice=jnp.zeros((paged, heads[0], heads[1] if spec.selection.profiled else 0), jnp.int32),
        limits=jnp.asarray(limits, jnp.float32),
        recent_k=zeros((paged, *heads, slots, head_dim)),
        recent_v=zeros((paged, *heads, slots, value_dim)),
        recent_significance=jnp.zeros(
            (paged, *heads, slots if spec.layout.scored else 0), jnp.float32
        ),
        ring_k=zeros((windowed, *heads, spec.ring_len, head_dim)),
        ring_v=zeros((windowed, *heads, spec.ring_len, value_dim)),
        classes=jnp.zeros(
            (spec.num_requests, spec.max_len if spec.selection.classed else 0), jnp.uint8
        ),
        seq_len=counter,
        recent_len=counter,
        observed=nothing_observed(spec.num_requests),
        overflow=jnp.zeros(spec.num_requests, bool),
        steps=counter,
        pending=counter - 1,
        fingerprint=jnp.zeros(32, jnp.uint8),
        queries=no_queries(spec.attention, paged, spec.num_requests)
        if spec.selection.score == "expected"
        else None,
        tables=tables,
    )


def _zeros(shape: tuple[int, ...] | None) -> Array | None:
    return None if shape is None else jnp.zeros(shape, jnp.float16)
