"""DiffKV's tiers in the shallow layers, MiniCache's pairs in the deep ones, and each alone:
the same prompts and steps through all three.
"""

import dataclasses
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from layers_without_weights import (
    CHUNK,
    FIRST,
    FLUSH,
    KV_HEADS,
    LAYERS,
    MODEL,
    REQUESTS,
    WINDOW,
    decode,
    draw,
)

import diffkv_jax as dkv
from diffkv_jax.cache.cache import empty_cache
from diffkv_jax.cache.pool_size import bound, with_pool
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.steps.jitted import prefill_chunk
from diffkv_jax.testing.parts import with_part
from diffkv_jax.testing.readback import held_tokens

ALPHA, OPTIONS = (1.0, 0.7), {"queries": 16, "window": WINDOW, "flush": FLUSH}
TIERS = dkv.diffkv(*ALPHA, **OPTIONS)
POLICIES = {
    "both": dataclasses.replace(TIERS, pairs=dkv.LayerPairs()),
    "tiers": TIERS,
    "pairs": dkv.minicache(inner="K8V4", window=WINDOW, flush=FLUSH),
}
SHALLOW, DEEP = range(FIRST), range(FIRST, LAYERS)
# tokens of each request in a prompt chunk and whether it is the last one, or decode steps
OPERATIONS = (
    ((11, 0), False),
    ((32, 8), False),
    ((32, 32), True),
    22,
    ((20, 32), True),
    5,
)
TOTALS = [
    sum(op[0][row] if isinstance(op, tuple) else op for op in OPERATIONS) for row in range(REQUESTS)
]


def empty(
    name: str, alpha: tuple[float, float] | None = None, free: int | None = None
) -> dkv.KVCache:
    """An empty cache with the pages that always suffice, or with only `free` of them."""
    policy = POLICIES[name]
    if alpha is not None:
        keep = dkv.Thresholds(alpha_high=alpha[0], alpha_low=alpha[1])
        policy = dataclasses.replace(policy, keep=keep)
    build = partial(
        CacheSpec.build, num_requests=REQUESTS, max_len=160, num_pages=0, dtype="float32", tokens=16
    )
    spec = with_pool(build(MODEL.attention, policy), policy, TOTALS, TOTALS, None)
    cache = jax.jit(empty_cache, static_argnums=0)(spec, bound(spec, policy))
    count = jnp.int32(spec.num_pages if free is None else free)
    return with_part(cache, "stored.ring.count", count)


class Moment(NamedTuple):
    """After an operation: what attention gave [L, ...], the exact keys and values that came, and
    the cache in NumPy.
    """

    out: np.ndarray
    k: np.ndarray  # [L, R, tokens, K, d]
    v: np.ndarray
    cache: dkv.KVCache


def operate(cache: dkv.KVCache, rng: np.random.Generator, operation) -> tuple[Moment, dkv.KVCache]:
    """One prompt chunk or some decode steps. The model has no weights: every policy sees the same
    queries, keys and values.
    """
    if isinstance(operation, tuple):
        lengths, last = operation
        inputs = draw(rng, CHUNK)
        tokens = jnp.zeros((REQUESTS, CHUNK), jnp.int32)
        out, cache = prefill_chunk(
            MODEL, inputs, cache, tokens, jnp.asarray(lengths), jnp.asarray(last)
        )
        outs, seen = (
            [
                np.where(
                    np.arange(CHUNK)[:, None, None]
                    >= CHUNK - np.reshape(lengths, (-1, 1, 1, 1, 1)),
                    out,
                    0,
                )
            ],
            [inputs],
        )
    else:
        outs, seen = [], []
        for _ in range(operation):
            inputs = draw(rng, 1)
            out, cache = decode(
                inputs, cache, jnp.zeros(REQUESTS, jnp.int32), jnp.ones(REQUESTS, bool)
            )
            outs.append(np.array(out))
            seen.append(inputs)
    k, v = (np.concatenate([inputs[i] for inputs in seen], axis=2) for i in (1, 2))
    return Moment(
        np.moveaxis(np.concatenate(outs, axis=2), 1, 0), k, v, jax.tree.map(np.array, cache)
    ), cache


def follow(cache: dkv.KVCache, operations=OPERATIONS, change=lambda cache: cache) -> list[Moment]:
    """The moments after each operation; `change` is done to the cache before it."""
    rng, moments = np.random.default_rng(1), []
    for operation in operations:
        moment, cache = operate(change(cache), rng, operation)
        moments.append(moment)
    return moments


@lru_cache
def whole_run(name: str, alpha: tuple[float, float] | None = None) -> list[Moment]:
    return follow(empty(name, alpha))


def stored(cache: dkv.KVCache, layer: int, row: int, head: int, scores: bool) -> dict[int, tuple]:
    """What a head holds, as things that compare: position to (tier, K, V, significance)."""
    held = held_tokens(cache, layer, row, head)
    second = "shared" if cache.spec.pairs is not None and layer >= FIRST else "low"
    names = {"high": "high", "low": second, "shared": second, "recent": "recent"}
    return {
        at: (names[tier], k.tobytes(), v.tobytes(), score if scores else 0)
        for at, (tier, k, v, score) in held.items()
    }


def differing(
    one: dkv.KVCache, other: dkv.KVCache, layers, scores: bool = False, shift: int = 0
) -> int:
    """Tokens that a head of one cache holds and that of the other does not, or otherwise; `shift`
    takes the next request's there.
    """
    count = 0
    for layer, row, head in np.ndindex(LAYERS, REQUESTS, KV_HEADS):
        if layer in layers:
            mine, theirs = (
                stored(one, layer, row, head, scores),
                stored(other, layer, (row + shift) % REQUESTS, head, scores),
            )
            count += sum(mine.get(at) != theirs.get(at) for at in mine.keys() | theirs.keys())
    return count
