"""Transforms that learn a map of each KV head from a calibration text: channels of keys that stand
out by offset or spread are brought to the size of the others before scales are shared.

`k' = (k - c) / s` and `q' = q s` leave every query's softmax as it is: all its logits change by one
number, `q . c`. `v' = v - c_v` comes back as `out + c_v`, as the weights add up to one. Softening
by a power of the spread is SmoothQuant's (arXiv:2211.10438).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from diffkv_jax.arguments import number, tuple_of
from diffkv_jax.model import AttentionSpec
from diffkv_jax.policy.stage import data, from_mapping, static, with_leaves
from diffkv_jax.policy.transform import Hadamard, Seen, Transform

LEAST_SPREAD = 1e-3  # of a channel; one that never changes is not blown up


class Centered(Transform):
    """Keys and values without their mean over the calibration text."""

    key_mean: Array | None = data(default=None)
    value_mean: Array | None = data(default=None)

    def fit(self, seen: Seen, attention: AttentionSpec) -> "Centered":
        means = ((seen.weight * x).sum(axis=0) for x in (seen.k, seen.v))
        return with_leaves(self, **dict(zip(("key_mean", "value_mean"), means, strict=True)))

    def check_model(self, attention: AttentionSpec) -> None:
        capped = attention.logits_soft_cap is not None
        _refuse(self, capped, "caps its logits, for which an offset of all keys matters")
        _refuse(
            self, attention.latent is not None, "has latents, which are keys and values at once"
        )

    def keys(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        return _plus(x, self.key_mean, 1 if back else -1)

    def values(self, x: Array) -> Array:
        return _plus(x, self.value_mean, -1)

    def output(self, x: Array) -> Array:
        return _plus(x, self.value_mean, 1)


class Balanced(Transform):
    """Channels of keys divided by a power of their standard deviation over the calibration text, of
    geometric mean one; those of queries multiplied by it.
    """

    power: float = static(default=0.5, convert=partial(number, least=0, most=1))
    key_scale: Array | None = data(default=None)

    def fit(self, seen: Seen, attention: AttentionSpec) -> "Balanced":
        mean = (seen.weight * seen.k).sum(axis=0)
        spread = jnp.sqrt((seen.weight * jnp.square(seen.k - mean)).sum(axis=0))
        logs = self.power * jnp.log(jnp.maximum(spread, LEAST_SPREAD))
        return with_leaves(self, key_scale=jnp.exp(logs - logs.mean(axis=-1, keepdims=True)))

    def check_model(self, attention: AttentionSpec) -> None:
        _refuse(
            self, attention.latent is not None, "has latents, which are keys and values at once"
        )

    def queries(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        return _times(x, self.key_scale, -1 if back else 1)

    def keys(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        return _times(x, self.key_scale, 1 if back else -1)


def _part(name: str, value: Any) -> Transform:
    return from_mapping(name, value, Transform)


class Chain(Transform):
    """Transforms one after the other, the first next to the model."""

    parts: tuple[Transform, ...] = data(
        default=(), convert=partial(tuple_of, each=_part, rule="transforms such as (Hadamard(),)")
    )

    def check(self) -> None:
        if without := [part for part in self.parts if part.position_free]:
            raise ValueError(
                f"parts={self.parts}: {without[0]} stores keys that depend on no position, and no "
                "other map goes with that: take it alone"
            )

    @property
    def learned(self) -> bool:
        return any(part.learned for part in self.parts)

    def fit(self, seen: Seen, attention: AttentionSpec) -> "Chain":
        fitted = []
        for part in self.parts:
            fitted.append(part := part.fit(seen, attention))
            q, k = part.queries(seen.q, attention), part.keys(seen.k, attention)
            seen = Seen(q, k, part.values(seen.v), seen.weight)
        return with_leaves(self, parts=tuple(fitted))

    def check_model(self, attention: AttentionSpec) -> None:
        for part in self.parts:
            part.check_model(attention)

    def queries(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        return self._through(x, lambda part, x: part.queries(x, attention, back=back), back)

    def keys(self, x: Array, attention: AttentionSpec, *, back: bool = False) -> Array:
        return self._through(x, lambda part, x: part.keys(x, attention, back=back), back)

    def values(self, x: Array) -> Array:
        return self._through(x, lambda part, x: part.values(x))

    def output(self, x: Array) -> Array:
        return self._through(x, lambda part, x: part.output(x), back=True)

    def _through(self, x: Array, verb: Callable, back: bool = False) -> Array:
        """Rounded once, to the dtype of x, at the end."""
        found = x.astype(jnp.float32)
        for part in reversed(self.parts) if back else self.parts:
            found = verb(part, found)
        return found.astype(x.dtype)


def even_channels(power: float = 0.5) -> Chain:
    """Centred, balanced and turned: four bits a channel hold keys with large offsets too."""
    return Chain((Centered(), Balanced(power), Hadamard()))


def maps_of(transform: Transform) -> list[Array]:
    """What it has learned; None where it has yet to learn."""
    return jax.tree.leaves(transform, is_leaf=_absent)


def with_maps(transform: Transform, maps: list[Any]) -> Transform:
    """The transform with what `maps_of` gave."""
    return jax.tree.unflatten(jax.tree.structure(transform, is_leaf=_absent), maps)


def _absent(value: Any) -> bool:
    return value is None


def _refuse(transform: Transform, wrong: bool, reason: str) -> None:
    if wrong:
        raise ValueError(f"transform={transform}, and the model {reason}: leave it out")


def _plus(x: Array, offset: Array | None, sign: int) -> Array:
    assert offset is not None, "a cache has what `calibrate` learned"
    return (x.astype(jnp.float32) + sign * offset).astype(x.dtype)


def _times(x: Array, scale: Array | None, power: int) -> Array:
    assert scale is not None, "a cache has what `calibrate` learned"
    factor = scale if power > 0 else 1 / scale
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
