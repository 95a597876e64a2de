"""What happens once a prompt has been gone over again: one event drops the tokens that got too
little attention (KVzip).
"""

import jax.numpy as jnp
from jax import Array, lax

from diffkv_jax.cache.admission import make_room
from diffkv_jax.cache.cache import KVCache
from diffkv_jax.cache.layer import layer_layout, per_head, stored_layer, take_layer, with_stored
from diffkv_jax.pallas_kernels.apply_event import Tokens, pages_beyond
from diffkv_jax.pallas_kernels.plan_event import DROPPED, Rule, count_moves
from diffkv_jax.policy.keep import stored_scores
from diffkv_jax.steps.event import Plan, apply_plan, tier_thresholds
from diffkv_jax.steps.prefill import PAGES_A_ROUND


def drop_least(cache: KVCache, due: Array) -> KVCache:
    """The stored tokens of the requests `due` (bool [R]) sorted into tiers, or dropped, by their
    scores; nothing leaves the window.

    A head whose tokens come to lie in two tiers may need a page more: a request that gets none
    overflows and is emptied. The kernels take all layers at once, plain XLA one by one.
    """
    tau = _thresholds(cache)
    if cache.spec.event_kernels.implementation != "xla":
        return _drop(cache, None, tau.reshape(-1, 2), due)
    return lax.fori_loop(
        0, len(tau), lambda layer, cache: _drop(cache, layer, tau[layer], due), cache
    )


def _thresholds(cache: KVCache) -> Array:
    """Scores float32 [L, B, 2] below which a token is not high, and is dropped; with
    `Selection.across_layers` one a request.
    """
    spec, stored = cache.spec, stored_layer(cache, None)
    layers, requests, kv_heads, _ = cache.limits.shape

    def by_request(x: Array) -> Array:
        """`[L x R x K, ...]` to `[R x L x K, ...]`."""
        return x.reshape(layers, requests, kv_heads, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    observed, budgets = (
        _of_all_heads(cache, jnp.zeros_like(cache.observed)),
        take_layer(cache.limits, None),
    )
    if not spec.selection.in_tokens:
        budgets = budgets * _of_all_heads(cache, cache.seq_len)[:, None]
    scores, live = stored_scores(spec.layout, stored, observed, spec.max_len)
    budgets, exact, scores, live = (
        by_request(x) for x in (budgets, _of_all_heads(cache, cache.recent_len), scores, live)
    )
    tau = tier_thresholds(
        spec,
        budgets,
        exact,
        scores,
        live,
        kv_heads * (layers if spec.selection.across_layers else 1),
    )
    return tau.reshape(requests, layers, kv_heads, 2).swapaxes(0, 1).reshape(layers, -1, 2)


def _of_all_heads(cache: KVCache, per_request: Array) -> Array:
    return per_head(cache, per_request, len(cache.spec.paged_layers))


def _drop(cache: KVCache, layer: Array | None, tau: Array, due: Array) -> KVCache:
    """The event in one layer (in all when None), with thresholds `tau [B, 2]`."""
    spec, stored = cache.spec, stored_layer(cache, layer)
    of_heads = per_head(cache, due, len(tau) // spec.num_heads)
    observed = jnp.zeros((len(tau), *cache.observed.shape[1:]), jnp.int32)
    rule = Rule(tau, observed, of_heads, jnp.zeros((len(tau), spec.layout.tiers), bool))
    table = stored.page_table, stored.tier_len
    moves = count_moves(
        stored.pages,
        spec.layout,
        *table,
        rule,
        one_victim=False,
        max_len=spec.max_len,
        kernels=spec.kernels,
    )
    recent_k, recent_v = (take_layer(x, layer) for x in (cache.recent_k, cache.recent_v))
    nothing = jnp.zeros(recent_k.shape[:2])
    tokens = Tokens(recent_k, recent_v, nothing, nothing.astype(jnp.int32))
    entering = jnp.full((len(tau), spec.flush), DROPPED, jnp.int32)
    plan = Plan(entering, rule, moves, pages_beyond(spec.layout, stored.tier_len, entering, moves))
    if spec.layout.tiers > 1:
        needed = jnp.where(of_heads, plan.pages, 0).reshape(
            -1, spec.num_requests, spec.attention.num_kv_heads
        )
        cache = make_room(cache, needed.sum(axis=(0, 2)))
        of_heads &= ~per_head(cache, cache.overflow, len(tau) // spec.num_heads)
        stored = stored_layer(cache, layer)
    layout = layer_layout(cache, layer)
    stored = apply_plan(
        spec, layout, stored, plan, tokens, of_heads, one_victim=False, pages_a_round=PAGES_A_ROUND
    )
    return with_stored(cache, layer, stored)
