"""What users give to `generate` and its siblings, checked and converted before anything runs."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from diffkv_jax.arguments import integer, refuse, shown
from diffkv_jax.cache.cache import KVCache
from diffkv_jax.methods.registry import load_policy
from diffkv_jax.model import CausalLM
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.sampling import Greedy, Sample


def check_model(caller: str, model: Any) -> None:
    """Refuse what is no model.

    Raises:
        TypeError: says so.
    """
    if isinstance(model, Mapping):
        raise TypeError(
            f"{caller} takes the model first and then its parameters, and model= is a mapping: "
            "swap them"
        )
    if isinstance(model, type) or not isinstance(model, CausalLM):
        rule = "a CausalLM, such as load_pretrained returns, with `attention` and `apply`"
        refuse("model", model, rule, True)
    try:
        hash(model)
    except TypeError as error:
        raise TypeError(
            f"model={shown(model)} must be hashable, as compiled programs are kept for it: {error}"
        ) from None


def as_params(caller: str, params: Any) -> Any:
    """The parameters with every array on the device.

    Raises:
        TypeError, ValueError: not a mapping of names to arrays, or some are traced or deleted.
    """
    rule = "the model's parameters, a mapping of names to arrays"
    if not isinstance(params, Mapping) or not params:
        refuse("params", params, rule, True)
    try:
        leaves = jax.tree_util.tree_leaves_with_path(params)
    except Exception:  # names that cannot be sorted, lists that hold themselves
        refuse("params", params, rule, True)
    check_outside_jit(caller, [leaf for _, leaf in leaves])
    for path, leaf in leaves:
        if not isinstance(leaf, np.ndarray | Array):
            name = f"params{jax.tree_util.keystr(path)}"
            refuse(name, leaf, "an array: load or initialise the parameters first", True)
        if isinstance(leaf, Array) and leaf.is_deleted():
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} was deleted or donated to another call: load "
                "it again"
            )
    return jax.tree.map(jnp.asarray, params)


def check_outside_jit(caller: str, *values: Any) -> None:
    """Refuse tracers: `caller` reads results on the host and compiles its own programs.

    Raises:
        TypeError: says what to call.
    """
    if any(_is_traced(x) for x in values):
        raise TypeError(
            f"{caller} was called inside jax.jit, vmap, grad or eval_shape: it compiles its own "
            "programs and reads their results, so call it outside with concrete arrays; inside, "
            "call diffkv_jax.steps.jitted.decode_step(model, params, cache, token, active), one "
            "step that is a pure function"
        )


def _is_traced(value: Any) -> bool:
    """Whether it is a tracer, or a list, mapping or cache of them."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, KVCache):
        value = jax.tree.leaves(value)
    parts = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(x, Tracer) for x in parts)


def as_policy(policy: Any) -> CompressionPolicy:
    """A policy, the name or file of one (`load_policy`), a method itself such as `dkv.snapkv`, or
    None: nothing is compressed.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if policy is None:
        return CompressionPolicy.none()
    inner = getattr(policy, "policy", None)
    if isinstance(inner, CompressionPolicy):  # a `FittedPolicy`
        rule = "a CompressionPolicy here: give its .policy, and its .calibration as calibration="
        refuse("policy", inner.name, rule)
    return load_policy(policy)


def as_samplings(sampling: Any, requests: int) -> tuple[Greedy | Sample, ...]:
    """One way of choosing tokens a request, from one for all or a list with one for each.

    Each is `Greedy()`, `Sample(...)`, one of these classes, a mapping of `Sample`'s fields,
    "greedy", "sample", or None: greedy.

    Raises:
        TypeError, ValueError: it is none of these, or a list of another length.
    """
    if isinstance(sampling, list | tuple):
        if len(sampling) != requests:
            rule = f"one for all or a list with one for each of the {requests} requests"
            refuse("sampling", sampling, rule)
        return tuple(_as_sampling(one) for one in sampling)
    return (_as_sampling(sampling),) * requests


def _as_sampling(sampling: Any) -> Greedy | Sample:
    named: dict[Any, Callable[[], Greedy | Sample]]
    named = {None: Greedy, "greedy": Greedy, "sample": Sample, Greedy: Greedy, Sample: Sample}
    if isinstance(sampling, Greedy | Sample):
        return sampling
    fields = tuple(inspect.signature(Sample).parameters)
    if isinstance(sampling, Mapping) and set(sampling) <= set(fields):
        return Sample(**sampling)
    if isinstance(sampling, str | None | type) and sampling in named:
        return named[sampling]()
    rule = f"Greedy(), Sample(...) or a mapping with any of {fields}"
    refuse("sampling", sampling, rule, not isinstance(sampling, str | Mapping))


def request_keys(samplings: Sequence[Greedy | Sample], key: Any, requests: int) -> Array:
    """One random key a request, from a seed, a key for all, or one for each.

    Raises:
        TypeError, ValueError: `key` is none of these, or missing and somebody draws.
    """
    if key is None:
        if any(isinstance(one, Sample) for one in samplings):
            raise ValueError(
                "sampling=Sample(...) needs key=, such as key=0 or key=jax.random.key(0)"
            )
        key = 0
    # as jax.random.PRNGKey makes them
    if isinstance(key, Array | np.ndarray) and key.dtype == np.uint32 and key.ndim in (1, 2):
        key = _wrapped(key)
    elif not isinstance(key, Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key(integer("key", key, most=2**63 - 1, least=-(2**63)) & 0xFFFFFFFF)
    if key.ndim == 1 and key.shape[0] == requests:
        return key
    if key.ndim:
        rule = "a seed, jax.random.key(seed) or one such key for each of the"
        refuse("key", key, f"{rule} {requests} requests")
    return _folded(key, jnp.arange(requests))


_folded = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


def _wrapped(key: Any) -> Array:
    try:
        return jax.random.wrap_key_data(jnp.asarray(key))
    except Exception:
        refuse("key", key, "a seed, jax.random.key(seed) or jax.random.PRNGKey(seed)")


def stop_ids(stop_token_ids: Any, model: CausalLM) -> Array:
    """Stop ids int32, -1 up to a power of two of at least 8: other numbers compile nothing.

    None takes those of the model (`model.stop_token_ids`), an empty list none.

    Raises:
        TypeError, ValueError: not token ids of the model.
    """
    vocab = model.attention.vocab_size
    given = getattr(model, "stop_token_ids", ()) if stop_token_ids is None else stop_token_ids
    if isinstance(given, set | frozenset):
        given = sorted(given, key=repr)
    if isinstance(given, np.ndarray | Array) and given.ndim == 1:
        given = list(np.asarray(given))
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        given = [given]
    rule = f"token ids from 0 to {vocab - 1}; leave out what the tokenizer does not have"
    try:
        stops = [integer("stop_token_ids", i, least=0, most=vocab - 1) for i in given]
    except (TypeError, ValueError) as error:
        if "when compiling" in str(error):
            raise
        refuse("stop_token_ids", stop_token_ids, rule, isinstance(error, TypeError))
    width = max(8, 1 << max(len(stops) - 1, 0).bit_length())
    return jnp.asarray([*stops, *[-1] * (width - len(stops))], jnp.int32)
