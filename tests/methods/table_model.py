"""A model whose q, k and v are looked up in tables, and tables for it."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffkv_jax import AttentionSpec
from diffkv_jax.models import self_attention
from diffkv_jax.steps.attend import attend
from diffkv_jax.testing.tiny import prompt, tiny_model

LAYERS, REQUESTS, KV_HEADS, GROUP, HEAD_DIM = 2, 3, 2, 2, 16
WINDOW, OBSERVE, CHUNK, MAX_LEN, STEPS = 8, 16, 32, 150, 70
SPEC = AttentionSpec(
    LAYERS,
    KV_HEADS * GROUP,
    KV_HEADS,
    HEAD_DIM,
    (None,) * LAYERS,
    HEAD_DIM**-0.5,
    None,
    2,
    MAX_LEN,
    "float32",
)


class Tables(NamedTuple):
    """What every position of every request asks, offers and holds: [layers, requests, MAX_LEN,
    heads, HEAD_DIM].
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray


class TableModel:
    """A `CausalLM` whose q, k, v are looked up by layer, request and position."""

    attention = SPEC

    def apply(self, variables, tokens, positions, cache=None, step=None, last_only=False):
        tables = variables["params"]
        rows = jnp.arange(REQUESTS)[:, None]

        def layer(cache, index):
            q, k, v = (table[index][rows, jnp.maximum(positions, 0)] for table in tables)
            return attend(cache, index, q, k, v, step)[1], None

        cache, _ = jax.lax.scan(layer, cache, jnp.arange(LAYERS))
        return jnp.zeros((REQUESTS, 1 if last_only else tokens.shape[1], SPEC.vocab_size)), cache


MODEL = TableModel()


def planted(seed: int) -> Tables:
    """Random tables in which few positions draw most of the attention, and which those are drifts
    along the sequence.
    """
    rng = np.random.default_rng(seed)
    shape = (LAYERS, REQUESTS, MAX_LEN)
    q, k, v = (
        rng.normal(size=(*shape, n, HEAD_DIM)) for n in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
    )
    topic = rng.normal(size=(6, HEAD_DIM))
    about = rng.integers(0, 6, (*shape, KV_HEADS))
    k += topic[about] * rng.choice([0.0, 0.5, 1.5], (*shape, KV_HEADS, 1), p=[0.5, 0.3, 0.2])
    now = (np.arange(MAX_LEN) // 12 + rng.integers(0, 2, MAX_LEN)) % 6
    q += topic[now][:, None] * rng.uniform(0.3, 1.2, (*shape, KV_HEADS * GROUP, 1))
    return Tables(*(x.astype(np.float32) for x in (q, k, v)))


def recorded(seed: int) -> Tables:
    """The q, k, v of a small llama-like model on random text."""
    model, params = tiny_model(
        q_heads=KV_HEADS * GROUP,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        layers=LAYERS,
        sharpness=6.0,
        seed=seed,
    )
    tokens = np.stack([prompt(MAX_LEN, seed * REQUESTS + i) for i in range(REQUESTS)])
    positions = np.broadcast_to(np.arange(MAX_LEN, dtype=np.int32), tokens.shape)
    store = Tables(
        *(
            jnp.zeros((LAYERS, REQUESTS, MAX_LEN, n, HEAD_DIM))
            for n in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
        )
    )

    def record(store, layer, q, k, v, step):
        positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
        out = self_attention.plain_attention(
            q, k, v, positions, jnp.int32(2**30), sm_scale=SPEC.sm_scale, logits_soft_cap=None
        )
        return out, Tables(
            *(table.at[layer].set(x) for table, x in zip(store, (q, k, v), strict=True))
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_attention, "attend", record)
        _, store = model.apply({"params": params}, tokens, positions, store, None)
    return Tables(*map(np.asarray, store))


@cache
def tables(kind: str, seed: int) -> Tables:
    return {"planted": planted, "recorded": recorded}[kind](seed)
