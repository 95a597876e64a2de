"""What happens once passes have gone over a prompt again (`Score.passes`): one event drops the
tokens that scored too low.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.admission import make_room
from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import LayerView
from diffkv_jax.pallas_kernels.plan_event import DROPPED
from diffkv_jax.policy.keep import KeepView, lines_of
from diffkv_jax.steps.event import apply_plan, planned, recent_tokens, stored_scores
from diffkv_jax.steps.store_chunk import PAGES_A_ROUND


def drop_least(cache: KVCache, due: Array) -> KVCache:
    """The stored tokens of the requests `due` (bool [R]) sorted into tiers, or dropped, by their
    scores; nothing leaves the window.

    A head whose tokens come to lie in two tiers may need a page more: a request that gets none
    overflows and is emptied. The kernels take all layers at once, plain XLA one by one.
    """
    tau, view = _thresholds(cache), LayerView(cache.spec, None)
    if cache.spec.event_kernels.implementation != "xla":
        return _drop(cache, view, tau.reshape(-1, 2), due)

    def drop_in(layer: Array, cache: KVCache) -> KVCache:
        return _drop(cache, LayerView(cache.spec, layer), tau[layer], due)

    return lax.fori_loop(0, view.num_layers, drop_in, cache)


def _thresholds(cache: KVCache) -> Array:
    """Scores float32 [L, B, 2] below which a token is not high, and is dropped; with
    `Keep.share_layers` one a request.
    """
    spec, view, keep = cache.spec, LayerView(cache.spec, None), cache.policy.keep
    layers, requests, kv_heads = shape = cache.stored.tier_len.shape[:3]

    def by_request(x: Array) -> Array:
        """`[L x R x K, ...]` to `[R x L x K, ...]`."""
        return x.reshape(*shape, *x.shape[1:]).swapaxes(0, 1).reshape(-1, *x.shape[1:])

    now = cache.counters
    query_spans = view.per_head(jnp.zeros_like(now.query_spans))
    scores, live = stored_scores(spec.layout, view.stored(cache), query_spans, spec.max_len)
    seq_len, exact = map(view.per_head, (now.seq_len, now.recent_len))
    sharing = kv_heads * (layers if keep.share_layers else 1)
    scores, live, seq_len, exact = map(by_request, (scores, live, seq_len, exact))
    keep_view = KeepView(scores, live, seq_len, exact, spec.layout.tiers, sharing)
    keep = jax.tree.map(lambda leaf: by_request(view.take(leaf)), keep)
    tau = lines_of(keep, keep_view)
    return tau.reshape(requests, layers, kv_heads, 2).swapaxes(0, 1).reshape(layers, -1, 2)


def _drop(cache: KVCache, view: LayerView, tau: Array, due: Array) -> KVCache:
    """The event in a layer, with thresholds `tau [B, 2]`."""
    spec, heads = cache.spec, len(tau)
    changes = view.per_head(due)
    query_spans = view.per_head(jnp.zeros_like(cache.counters.query_spans))
    entering = jnp.full((heads, spec.flush), DROPPED, jnp.int32)
    plan = planned(spec, view.stored(cache), query_spans, tau, entering, changes)
    tokens, _ = recent_tokens(cache, view)
    if spec.layout.tiers > 1:
        cache = make_room(cache, view.by_request(jnp.where(changes, plan.pages, 0)))
        changes &= ~view.per_head(cache.counters.overflow)
    return apply_plan(cache, view, plan, tokens, changes, pages_a_round=PAGES_A_ROUND)
