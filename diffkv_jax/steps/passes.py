"""What happens once passes have gone over a prompt again (`Score.passes`): one event drops the
tokens that scored too low.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.admission import make_room
from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import per_head, stored_layer, take_layer
from diffkv_jax.pallas_kernels.apply_event import Tokens
from diffkv_jax.pallas_kernels.plan_event import DROPPED
from diffkv_jax.policy.keep import KeepView
from diffkv_jax.steps.event import apply_plan, planned, stored_scores
from diffkv_jax.steps.store_chunk import PAGES_A_ROUND


def drop_least(cache: KVCache, due: Array) -> KVCache:
    """The stored tokens of the requests `due` (bool [R]) sorted into tiers, or dropped, by their
    scores; nothing leaves the window.

    A head whose tokens come to lie in two tiers may need a page more: a request that gets none
    overflows and is emptied. The kernels take all layers at once, plain XLA one by one.
    """
    tau = _thresholds(cache)
    if cache.spec.event_kernels.implementation != "xla":
        return _drop(cache, None, tau.reshape(-1, 2), due)
    layers = len(cache.spec.paged_layers)
    return lax.fori_loop(
        0, layers, lambda layer, cache: _drop(cache, layer, tau[layer], due), cache
    )


def _thresholds(cache: KVCache) -> Array:
    """Scores float32 [L, B, 2] below which a token is not high, and is dropped; with
    `Keep.share_layers` one a request.
    """
    spec, stored, keep = cache.spec, stored_layer(cache, None), cache.policy.keep
    layers, requests, kv_heads = shape = cache.tier_len.shape[:3]

    def by_request(x: Array) -> Array:
        """`[L x R x K, ...]` to `[R x L x K, ...]`."""
        return x.reshape(*shape, *x.shape[1:]).swapaxes(0, 1).reshape(-1, *x.shape[1:])

    query_spans = _of_all_heads(cache, jnp.zeros_like(cache.query_spans))
    scores, live = stored_scores(spec.layout, stored, query_spans, spec.max_len)
    seq_len, exact = (_of_all_heads(cache, x) for x in (cache.seq_len, cache.recent_len))
    sharing = kv_heads * (layers if keep.share_layers else 1)
    scores, live, seq_len, exact = map(by_request, (scores, live, seq_len, exact))
    view = KeepView(scores, live, seq_len, exact, spec.layout.tiers, sharing)
    keep = jax.tree.map(lambda leaf: by_request(take_layer(leaf, None)), keep)
    tau = keep.thresholds(view)
    return tau.reshape(requests, layers, kv_heads, 2).swapaxes(0, 1).reshape(layers, -1, 2)


def _of_all_heads(cache: KVCache, per_request: Array) -> Array:
    return per_head(cache, per_request, len(cache.spec.paged_layers))


def _drop(cache: KVCache, layer: Array | None, tau: Array, due: Array) -> KVCache:
    """The event in one layer (in all when None), with thresholds `tau [B, 2]`."""
    spec, stored, heads = cache.spec, stored_layer(cache, layer), len(tau)
    layers = heads // spec.num_heads
    changes = per_head(cache, due, layers)
    query_spans = jnp.zeros((heads, *cache.query_spans.shape[1:]), jnp.int32)
    entering = jnp.full((heads, spec.flush), DROPPED, jnp.int32)
    plan = planned(spec, stored, query_spans, tau, entering, changes)
    recent_k, recent_v = (take_layer(x, layer) for x in (cache.recent_k, cache.recent_v))
    nothing = jnp.zeros(recent_k.shape[:2])
    tokens = Tokens(recent_k, recent_v, nothing, nothing.astype(jnp.int32))
    if spec.layout.tiers > 1:
        needed = jnp.where(changes, plan.pages, 0)
        needed = needed.reshape(-1, spec.num_requests, spec.attention.num_kv_heads)
        cache = make_room(cache, needed.sum(axis=(0, 2)))
        changes &= ~per_head(cache, cache.overflow, layers)
    return apply_plan(cache, layer, plan, tokens, changes, pages_a_round=PAGES_A_ROUND)
