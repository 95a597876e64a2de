"""Prompts that a model has read once, for the caches of many policies: a prompt's queries, keys and
values are the same in all of them while it is attended exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffkv_jax.cache.cache import KVCache
from diffkv_jax.calibration.probe import causal_attention
from diffkv_jax.model import AttentionSpec, CausalLM
from diffkv_jax.steps.attend import attend
from diffkv_jax.steps.step import ScoreStep


class Recorded(NamedTuple):
    """What attention is given for R sequences of N tokens, in the model's dtype."""

    q: Array  # [layers, R, N, num_q_heads, d]
    k: Array  # [layers, R, N, num_kv_heads, d]
    v: Array  # likewise; no channels where values are part of the keys


class Prompts(NamedTuple):
    """Prompts, and what follows when they are repeated behind themselves."""

    first: Recorded
    again: Recorded | None


def record(model: CausalLM, params: Mapping[str, Any], rows: np.ndarray, twice: bool) -> Prompts:
    """Read the prompts `rows` int32 [R, N], and with `twice` once again behind themselves."""
    n = rows.shape[1]
    read = np.concatenate([rows, rows], axis=1) if twice else rows
    seen = [_recorded(model, params, jnp.asarray(row)) for row in read]
    whole = jax.tree.map(lambda *each: jnp.stack(each, axis=1), *seen)
    first = jax.tree.map(lambda x: x[:, :, :n], whole)
    return Prompts(first, jax.tree.map(lambda x: x[:, :, n:], whole) if twice else None)


@dataclass(frozen=True)
class Replayed:
    """Takes the model's place where the prompts are read: its parameters are `Prompts`, over and
    over again for more requests than these have. Its logits are zeros.
    """

    attention: AttentionSpec

    def apply(
        self,
        variables: Mapping[str, Any],
        tokens: Array,
        positions: Array,
        cache: Any = None,
        step: Any = None,
        last_only: bool = False,
    ) -> tuple[Array, Any]:
        """`CausalLM.apply`."""
        prompts: Prompts = variables["params"]
        seen = prompts.again if isinstance(step, ScoreStep) else prompts.first
        assert seen is not None
        requests, width = tokens.shape

        def batch(x: Array) -> Array:
            padded = jnp.pad(x, ((0, 0), (width - x.shape[1], 0), (0, 0), (0, 0)))
            return jnp.tile(padded, (requests // len(x), 1, 1, 1))

        def layer(cache: KVCache, inputs: tuple[Array, Recorded]) -> tuple[KVCache, None]:
            number, heads = inputs
            q, k, v = map(batch, heads)
            return attend(cache, number, q, k, v, step)[1], None

        cache, _ = lax.scan(layer, cache, (jnp.arange(self.attention.num_layers), seen))
        rows = 1 if last_only else width
        return jnp.zeros((requests, rows, self.attention.vocab_size), jnp.float32), cache


@partial(jax.tree_util.register_dataclass, data_fields=["seen"], meta_fields=["attention"])
@dataclass(frozen=True)
class Recorder:
    """Takes a cache's place in `CausalLM.apply` for one sequence, and keeps what it is given."""

    attention: AttentionSpec
    seen: Recorded  # [layers, N, heads, d], filled layer by layer

    def attend(self, layer: Array, q: Array, k: Array, v: Array) -> tuple[Array, "Recorder"]:
        """`attend` of the cache: `q [1, N, num_q_heads, d]`, `k`, `v [1, N, num_kv_heads, d]`."""
        n, kv_heads = k.shape[1:3]

        def head(heads: tuple[Array, Array, Array]) -> Array:  # the weights of one exist at a time
            exact = (x.astype(jnp.float32) for x in heads)
            return causal_attention(self.attention, layer, *exact)[0]

        heads = (
            jnp.moveaxis(x[0].reshape(n, kv_heads, x.shape[2] // kv_heads, x.shape[3]), 1, 0)
            for x in (q, k, v)
        )
        out = jnp.moveaxis(lax.map(head, tuple(heads)), 0, 1).reshape(n, q.shape[2], -1)
        seen = Recorded(
            *(
                lax.dynamic_update_slice_in_dim(kept, new.astype(kept.dtype), layer, 0)
                for kept, new in zip(self.seen, (q, k, v), strict=True)
            )
        )
        return out[None].astype(q.dtype), replace(self, seen=seen)


@partial(jax.jit, static_argnames="model")
def _recorded(model: CausalLM, params: Mapping[str, Any], tokens: Array) -> Recorded:
    """Of one sequence int32 `[N]`: `[layers, N, heads, d]`."""
    attention, n = model.attention, len(tokens)

    def empty(heads: int, channels: int = attention.head_dim) -> Array:
        return jnp.zeros((attention.num_layers, n, heads, channels), attention.dtype)

    values = attention.head_dim if attention.latent is None else 0
    kv_heads = attention.num_kv_heads
    nothing = Recorded(empty(attention.num_q_heads), empty(kv_heads), empty(kv_heads, values))
    _, recorder = model.apply(
        {"params": params},
        tokens[None],
        jnp.arange(n)[None],
        Recorder(attention, nothing),
        last_only=True,
    )
    return recorder.seen
