"""`KVCache`: the whole compressed cache as one immutable pytree."""

from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffkv_jax.cache.query_counts import no_query_spans
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.pallas_kernels.apply_event import FreeRing, Stored
from diffkv_jax.pallas_kernels.codecs import Codec
from diffkv_jax.pallas_kernels.pages import Pages
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.stage import with_leaves

Table = Array | np.ndarray | None
# of K and V in each tier, None where the codec learns nothing
Tables = tuple[tuple[Table, Table], ...]


class Recent(NamedTuple):
    """The recent window of every head, oldest token first; N = window + flush slots."""

    k: Array  # [L, R, K, N, head_dim] cache dtype
    v: Array  # [L, R, K, N, head_dim]; absent with `AttentionSpec.latent`, as is `Sliding.v`
    significance: Array  # float32 [L, R, K, N]; absent when the policy does not score


class Sliding(NamedTuple):
    """The last tokens of the sliding-window layers; position p lies in slot p % ring_len."""

    k: Array  # [S, R, K, ring_len, head_dim]
    v: Array  # [S, R, K, ring_len, head_dim]


class Counters(NamedTuple):
    """Where each request stands, as `cache.counters`."""

    seq_len: Array  # int32 [R] tokens seen
    recent_len: Array  # int32 [R] tokens in the recent window
    # int32 [R, spans, 2] (end, length) of the positions whose queries scored, the last ones of a
    # score that forgets (`steps.forget`)
    query_spans: Array
    steps: Array  # int32 [R] decode steps since the last prompt
    overflow: Array  # bool [R] the pool could not give this request a page
    pending: Array  # int32 [R] token sampled last and not yet seen by the model, -1 = none


class MethodState(NamedTuple):
    """What the stages of a policy carry from event to event, and the classes of tokens."""

    score: Any = None  # `Score.init`; axes [L, R, K, ...], as those of `keep`
    keep: Any = None  # `Keep.init`
    # uint8 [R, max_len], no axis of layers: class of the token at each position; absent unless the
    # policy names tokens
    classes: Any = None


class InChunk(NamedTuple):
    """What goes from layer to layer while a prompt chunk of C tokens is read; else None."""

    present: Array | None = None  # bool [R, C] not dropped so far, where `Score.hides_dropped`
    waiting: "Waiting | None" = None  # where layers are merged


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

    Axes: L paged layers, S sliding-window layers, R requests, K KV heads. An array that would have
    no element, such as the rings of a model without sliding windows, is None: checkpoints cannot
    hold empty arrays. Within a step all arrays are there (`complete`).
    """

    spec: CacheSpec = field(metadata={"static": True})
    policy: CompressionPolicy  # its thresholds or budgets are arrays [L, R, K]
    # pool and free pages, shared by all layers, heads and requests; page_table int32 [L, R, K,
    # max_pages], tier_len int32 [L, R, K, tiers]. Tier 0 grows from the left of a table, the other
    # one of a layer from the right; num_pages = none
    stored: Stored
    recent: Recent
    sliding: Sliding
    counters: Counters
    state: MethodState
    tables: Tables  # float16 or bfloat16 [L, K, ...] what learned codecs have learned
    # uint8 [32] of the parameters that made it (`diffkv_jax.calibration.calibration`), zeros = not
    # told
    fingerprint: Array
    in_chunk: InChunk = InChunk()

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"KVCache(num_requests={spec.num_requests}, max_len={spec.max_len}, "
            f"num_pages={spec.num_pages}, dtype={spec.dtype!r})"
        )


jax.tree_util.register_dataclass(
    KVCache, data_fields=[f.name for f in fields(KVCache) if f.name != "spec"], meta_fields=["spec"]
)


def with_significance(cache: KVCache, paged: Array, recent: Array | None = None) -> KVCache:
    """The cache with other scores of all stored tokens, as in `Pages`, and of the recent ones."""
    pages = replace(cache.stored.pages, significance=paged)
    cache = replace(cache, stored=cache.stored._replace(pages=pages))
    if recent is None:
        return cache
    return replace(cache, recent=cache.recent._replace(significance=recent))


def with_counters(cache: KVCache, **counters: Array) -> KVCache:
    """The cache with other `Counters`."""
    return replace(cache, counters=cache.counters._replace(**counters))


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
    spec: CacheSpec, policy: CompressionPolicy, tables: Tables | None = None
) -> KVCache:
    """A cache without tokens; every page is zeroed and free.

    `policy` is bound (`CompressionPolicy.bind`); `tables` of the shapes `table_shapes(spec)`, zeros
    when None: good to count.
    """
    return without_empty(_all_arrays(spec, policy, tables))


def without_empty(cache: KVCache) -> KVCache:
    """The cache with None for each array that has no element."""
    return jax.tree.map(lambda array: array if array.size else None, cache)


def complete(cache: KVCache) -> KVCache:
    """Inverse of `without_empty`: every array is there, as steps and kernels want it. Under jit the
    empty ones cost nothing.
    """
    policy = cache.policy
    if not cache.spec.paged_layers:  # its leaves have no element
        policy = with_leaves(policy, keep=jax.tree.map(lambda _: _NONE, policy.keep, is_leaf=_none))
    whole = jax.eval_shape(partial(_all_arrays, cache.spec), policy)

    def there(array: Array | None, shape: jax.ShapeDtypeStruct | None) -> Array | None:
        if array is None and shape is not None:
            return jnp.zeros(shape.shape, shape.dtype)
        return array

    return jax.tree.map(there, cache, whole, is_leaf=_none)


def _none(x: Any) -> bool:
    return x is None


_NONE = jax.ShapeDtypeStruct((0, 0, 0), jnp.float32)


def _all_arrays(spec: CacheSpec, policy: CompressionPolicy, tables: Tables | None = None):
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
        policy=jax.tree.map(jnp.asarray, policy),
        stored=Stored(
            Pages.zeros(spec.layout, spec.num_pages),
            FreeRing.full(spec.num_pages),
            jnp.full((paged, *heads, spec.max_pages), spec.num_pages, jnp.int32),
            jnp.zeros((paged, *heads, spec.layout.tiers), jnp.int32),
        ),
        recent=Recent(
            zeros((paged, *heads, slots, head_dim)),
            zeros((paged, *heads, slots, value_dim)),
            jnp.zeros((paged, *heads, slots if spec.layout.scored else 0), jnp.float32),
        ),
        sliding=Sliding(
            zeros((windowed, *heads, spec.ring_len, head_dim)),
            zeros((windowed, *heads, spec.ring_len, value_dim)),
        ),
        counters=Counters(
            seq_len=counter,
            recent_len=counter,
            query_spans=no_query_spans(spec.num_requests),
            steps=counter,
            overflow=jnp.zeros(spec.num_requests, bool),
            pending=counter - 1,
        ),
        state=MethodState(
            policy.score and policy.score.init(spec.attention, paged, spec.num_requests),
            policy.keep.init((paged, *heads)),
            jnp.zeros((heads[0], spec.max_len if policy.classifies else 0), jnp.uint8),
        ),
        tables=tables,
        fingerprint=jnp.zeros(32, jnp.uint8),
    )


def _zeros(shape: tuple[int, ...] | None) -> Array | None:
    return None if shape is None else jnp.zeros(shape, jnp.float16)
