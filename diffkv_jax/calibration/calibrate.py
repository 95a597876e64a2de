"""`calibrate`: learned codecs' tables from what a model makes of some text."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from diffkv_jax.arguments import flag, integer
from diffkv_jax.batching import as_batch, check_context
from diffkv_jax.cache.cache import Tables, table_shapes
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.calibration.calibration import Calibration, fingerprint
from diffkv_jax.calibration.kmeans import weighted_kmeans
from diffkv_jax.calibration.probe import Activations, activations
from diffkv_jax.calibration.sample_text import built_in_rows
from diffkv_jax.calibration.usual import with_usual
from diffkv_jax.inputs import as_params, as_policy, check_model, check_outside_jit
from diffkv_jax.model import AttentionSpec, CausalLM
from diffkv_jax.pallas_kernels.codecs import Codec, Fitting
from diffkv_jax.pallas_kernels.codecs.scales import needs_wide
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.pallas_kernels.rope import at_positions
from diffkv_jax.policy.affine import maps_of
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.transform import Seen, Transform

USUAL = 4096  # tokens of context
SEQUENCES, LENGTH = 4, 1024  # at most, where no tokens are given


class Samples(NamedTuple):
    """Keys or values of some tokens as the model makes them, and the loss' gradients by them (ones
    without Fisher).
    """

    x: Array | np.ndarray  # float32 [L, n, K, d]
    gradient: Array | np.ndarray  # float32 [L, n, K, d]


class Attended(NamedTuple):
    """What queries make of the samples' tokens."""

    queries: np.ndarray  # float32 [L, K, d, d], their second moments
    weight: np.ndarray  # float32 [L, n, K], squared attention that a token gets, summed


@in_32_bits
def calibrate(
    model: CausalLM,
    params: Mapping[str, Any],
    tokens: Any = None,
    policy: CompressionPolicy | str | None = None,
    *,
    fisher: bool = True,
    samples: int = 8192,
    iterations: int = 50,
    q_norm: bool | None = None,
    seed: int = 0,
    context: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Learn the tables of a policy's codecs, and the arrays of its transform; of the built-in text
    with `calibrate(model, params, policy)`.

    Args:
        model: as for `generate`; used in full precision, without a cache.
        params: its parameters.
        tokens: int [S, N], S sequences of calibration text, N at least 2. The papers take 16 of
            2,048. None: 4 of 1,024 or the model's context, for models from `load_pretrained`.
        policy: whose codecs learn, from keys and values as it stores them (`transform`).
        fisher: weigh errors by the squared gradient of the loss (one backward pass a sequence), as
            the papers do; else all alike.
        samples: tokens that are learned from, evenly spaced over all; each takes 4 float32 numbers
            a channel, layer and KV head.
        iterations: of k-means.
        q_norm: whether learned levels keep the mean and deviation of what they code (KVQuant's
            Q-Norm); None: at two bits or fewer.
        seed: of its random seeds.
        context: the sequences begin at positions spread over so many, as rotary embeddings turn the
            offsets of slow channels with the position, and what is learned at the first 1,024 need
            not hold at the 4,096th. None: 4,096, or the model's context.
        progress: show a progress bar.

    Raises:
        ValueError: bad tokens, or none and a model without a text; nothing in the policy learns.
    """
    check_model("calibrate", model)
    params = as_params("calibrate", params)
    tokens, policy = _in_place(model, tokens, policy)
    fisher, progress = flag("fisher", fisher), flag("progress", progress)
    samples = integer("samples", samples, least=1)
    iterations = integer("iterations", iterations, least=1)
    q_norm = None if q_norm is None else flag("q_norm", q_norm)
    key = jax.random.key(integer("seed", seed, least=0))
    batch = _checked(model, tokens)
    first = _first_positions(model.attention, batch, context)
    spec = spec_of(model, policy, batch.shape[1])
    total = _tables_to_learn(spec, policy)
    # exact sinks never meet a learned codec
    at = _spread(batch, samples, policy.protect.sinks if policy.tiers[0] == "full" else 0)
    both, attended = _collect(model, params, batch, first, spec, at, fisher and total > 0, progress)
    transform = _fitted(policy.transform, both, attended, model.attention)
    how = Fitting(partial(weighted_kmeans, iterations=iterations), q_norm)
    with tqdm(total=total, desc="learning tables", unit=" layers", disable=not progress) as bar:
        tables = _learn(spec, transform, both, fisher, key, how, bar)
    maps = tuple(np.asarray(x) for x in maps_of(transform))
    return Calibration(tables, policy.tiers, policy.transform, fingerprint(model, params), maps)


def _first_positions(attention: AttentionSpec, batch: np.ndarray, context: Any) -> np.ndarray:
    """Where each sequence `[S, N]` begins, int32 [S], evenly spaced."""
    most, length = attention.max_position_embeddings, batch.shape[1]
    usual = max(min(USUAL, most), length)
    context = usual if context is None else integer("context", context, least=length, most=most)
    return np.linspace(0, context - length, len(batch)).astype(np.int32)


def _in_place(model: CausalLM, tokens: Any, policy: Any) -> tuple[Any, CompressionPolicy]:
    """Tokens and policy, where either the tokens or both are left to us, and its transform."""
    if policy is None and isinstance(tokens, CompressionPolicy | str):
        tokens, policy = None, tokens
    tokens = built_in_rows(model, LENGTH)[:SEQUENCES] if tokens is None else tokens
    return tokens, with_usual(as_policy(policy), model.attention)


def spec_of(model: CausalLM, policy: CompressionPolicy, length: int) -> CacheSpec:
    """Of a cache for one request of `length` tokens that has no pages."""
    attention = model.attention
    return CacheSpec.build(
        attention, policy, num_requests=1, max_len=length, num_pages=0, dtype=attention.dtype
    )


def _tables_to_learn(spec: CacheSpec, policy: CompressionPolicy) -> int:
    """Tables to learn, one a layer and learned codec; a policy without any is refused."""
    if not spec.paged_layers:
        raise ValueError(
            "every layer of the model has a sliding window, whose tokens are not compressed: there "
            f"is nothing to calibrate; take another policy than {policy.name!r}"
        )
    shapes = table_shapes(spec)
    total = len(spec.paged_layers) * sum(shape is not None for pair in shapes for shape in pair)
    if not total and not policy.transform.learned:
        raise ValueError(
            f"policy {policy.name!r} has no learned codec in tiers={policy.tiers} and no "
            "transform that learns: there is nothing to calibrate"
        )
    return total


def _learn(
    spec: CacheSpec,
    transform: Transform,
    both: tuple[Samples, Samples],
    fisher: bool,
    key: Array,
    how: Fitting,
    bar: tqdm,
) -> Tables:
    """The tables of all tiers from keys and values, as they are stored, a layer at a time."""

    def learned(codec: Codec, given: Samples, stored: Callable) -> np.ndarray | None:
        if not codec.learned:
            return None
        layers = []
        for layer, pair in enumerate(zip(given.x, given.gradient, strict=True)):
            heads = jax.tree.map(lambda leaf, layer=layer: leaf[layer], transform)
            x, gradient = stored(heads, *map(jnp.asarray, pair), spec.attention)
            weight = jnp.square(gradient) if fisher else jnp.ones_like(x)
            # [K, d, n]
            block, cost = (jnp.moveaxis(part, 0, 2) for part in (x, weight))
            fitted = codec.fit(block, cost, jax.random.fold_in(key, layer), how)
            layers.append(np.asarray(fitted))
            bar.update()
        return _as_stored(np.stack(layers))

    keys, values = both
    return tuple(
        (learned(fmt.key, keys, _stored_keys), learned(fmt.value, values, _stored_values))
        for fmt in spec.layout.formats
    )


def _as_stored(tables: np.ndarray) -> np.ndarray:
    """The float32 tables `[L, K, ...]` of all layers in float16, or bfloat16 if that overflows."""
    largest = np.abs(tables).max(axis=tuple(range(2, tables.ndim)))
    return tables.astype(jnp.bfloat16 if needs_wide(jnp.asarray(largest)).any() else np.float16)


def _checked(model: CausalLM, tokens: Any) -> np.ndarray:
    check_outside_jit("calibrate", tokens)
    batch, sizes = as_batch(tokens, model.attention.vocab_size)
    if batch.shape[1] < 2 or (sizes != batch.shape[1]).any():
        raise ValueError(
            "calibration sequences must have one length of at least 2 tokens, given lengths "
            f"{sorted(set(sizes.tolist()))}"
        )
    check_context(model.attention, sizes, batch.shape[1])
    return batch


def _spread(batch: np.ndarray, samples: int, first: int) -> np.ndarray:
    """Places int32 [n], evenly spaced from `first` on, of a sequence's share of `samples` tokens;
    not the last, which no loss looks at.
    """
    places = batch.shape[1] - 1 - first
    if places < 1:
        raise ValueError(
            f"calibration sequences of {batch.shape[1]} tokens have none between the policy's "
            f"{first} sinks and the last one"
        )
    count = min(places, -(-samples // len(batch)))
    return np.linspace(first, batch.shape[1] - 2, count).astype(np.int32)


def _collect(
    model: CausalLM,
    params: Mapping[str, Any],
    batch: np.ndarray,
    first: np.ndarray,
    spec: CacheSpec,
    at: np.ndarray,
    fisher: bool,
    progress: bool,
) -> tuple[tuple[Samples, Samples], Attended]:
    """Of the paged layers: keys and values of the tokens `at` of every sequence, whose positions
    begin at `first`, and what becomes of them.
    """
    seen, attended = [], []
    layers = np.asarray(spec.paged_layers)
    rows = list(zip(batch, first, strict=True))
    for row, begin in tqdm(rows, desc="reading text", unit=" sequences", disable=not progress):
        found = activations(model, params, jnp.asarray(row), jnp.int32(begin), gradients=fisher)
        seen.append(jax.device_get(_paged(spec, found, at, begin, fisher)))
        weight = np.asarray(found.weight)[layers[:, None], at]
        attended.append(Attended(np.asarray(found.queries)[layers], weight))
    keys, values = (
        Samples(*(np.concatenate(part, axis=1) for part in zip(*side, strict=True)))
        for side in zip(*seen, strict=True)
    )
    for kind, side in (("keys", keys), ("values", values)):
        for what, part in ((kind, side.x), (f"the loss' gradients by the {kind}", side.gradient)):
            for layer in np.flatnonzero(~np.isfinite(part).all(axis=(1, 2, 3))):
                raise ValueError(
                    f"{what} of layer {spec.paged_layers[layer]} are not finite, so that nothing "
                    f"can be learned from them: the model computes in {spec.attention.dtype}; load "
                    "it with dtype='float32', or look for NaN in the parameters"
                )
    queries, weight = zip(*attended, strict=True)
    return (keys, values), Attended(np.mean(queries, axis=0), np.concatenate(weight, axis=1))


def _paged(
    spec: CacheSpec, seen: Activations, at: np.ndarray, first: int, fisher: bool
) -> tuple[Samples, Samples]:
    """The tokens `at` int [n] of one sequence, whose positions begin at `first`, in the paged
    layers, before the transform; `fisher` has the gradients as they are.
    """
    layers = np.asarray(spec.paged_layers)[:, None]
    k, v, k_gradient, v_gradient = (x[layers, at] for x in seen[:4])
    if spec.attention.latent is not None:  # the rest of the key stays exact
        k, k_gradient = k[..., : spec.attention.latent], k_gradient[..., : spec.attention.latent]
    if spec.layout.rope is not None:
        position, rope = jnp.asarray(first + at)[None, None], spec.layout.rope
        pair = (jnp.swapaxes(x, 1, 2) for x in (k, k_gradient))
        pair = (at_positions(x, position, rope, back=True) for x in pair)
        k, k_gradient = (jnp.swapaxes(x, 1, 2) for x in pair)
    return tuple(
        Samples(x, g if fisher else jnp.ones_like(x)) for x, g in ((k, k_gradient), (v, v_gradient))
    )  # pyright: ignore


def _fitted(
    transform: Transform, both: tuple[Samples, Samples], attended: Attended, model: AttentionSpec
) -> Transform:
    """The transform with what it learns of each layer."""
    if not transform.learned:
        return transform
    queries = np.stack([_like_moments(layer) for layer in attended.queries])
    weight = attended.weight / attended.weight.sum(axis=1, keepdims=True)
    layers = zip(queries, *(side.x for side in both), weight[..., None], strict=True)
    fits = [transform.fit(Seen(*map(jnp.asarray, layer)), model) for layer in layers]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *fits)


def _like_moments(moments: np.ndarray) -> np.ndarray:
    """As many vectors as channels, float32 [d, K, d], of these second moments [K, d, d]."""
    sizes, axes = np.linalg.eigh(moments.astype(np.float64))
    sizes = np.maximum(sizes, 0) * moments.shape[-1]
    return np.moveaxis(axes * np.sqrt(sizes)[:, None], 2, 0).astype(np.float32)


def _stored_keys(heads: Transform, k: Array, gradient: Array, model: AttentionSpec):
    """Keys as they are stored, and gradients by those: they go through the inverse transposed."""
    return heads.keys(k, model), heads.queries(gradient, model)


def _stored_values(heads: Transform, v: Array, gradient: Array, model: AttentionSpec):
    stored = heads.values(v)
    return stored, jax.vjp(heads.output, stored)[1](gradient)[0]
