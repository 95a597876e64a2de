"""`make_cache`: an empty cache for requests of given lengths, within a memory budget."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import humanize
import jax
import jax.numpy as jnp
import numpy as np

from diffkv_jax.arguments import (
    WrongType,
    flag,
    instance,
    integer,
    nearest,
    one_of,
    refuse,
    tuple_of,
)
from diffkv_jax.batching import check_context, chunk_size
from diffkv_jax.cache.cache import KVCache, empty_cache
from diffkv_jax.cache.kernels import kernels_for
from diffkv_jax.cache.pool_size import bound, cache_bytes, kept_within, with_pool
from diffkv_jax.cache.spec import CacheSpec
from diffkv_jax.calibration.calibration import Calibration, learned_for
from diffkv_jax.calibration.usual import as_calibrated
from diffkv_jax.choice.automatic import (
    CALIBRATE,
    AutoPolicy,
    asks_for_fit,
    check_no_calibration,
    chosen,
)
from diffkv_jax.choice.fitted import FittedPolicy
from diffkv_jax.choice.judged import judge
from diffkv_jax.inputs import as_policy, check_model, check_outside_jit
from diffkv_jax.methods.diffkv import diffkv
from diffkv_jax.model import AttentionSpec, CausalLM
from diffkv_jax.pallas_kernels.codecs.full import DTYPES
from diffkv_jax.pallas_kernels.dispatch import Kernels
from diffkv_jax.pallas_kernels.precision import in_32_bits
from diffkv_jax.policy.keep import Budget, KeepAll
from diffkv_jax.policy.policy import CompressionPolicy
from diffkv_jax.policy.stage import with_leaves
from diffkv_jax.units import parse_bytes

LINE = 6  # frames up from `judge` to the line that calls `generate`


class CacheOptions(TypedDict, total=False):
    """What `generate` makes a new cache with.

    Attributes:
        policy: how to compress: a `CompressionPolicy`, what `load_policy` takes, a `FittedPolicy`,
            "auto" or an `AutoPolicy`, which is fitted to the model first and kept; None: nothing is
            compressed.
        memory_budget: bytes or text such as "512MiB" for the whole cache; None reserves for every
            token in the highest tier.
        max_len: most tokens that a request may ever come to in this cache; what this call needs
            when None.
        cache_dtype: dtype of exact tokens ("full" tier, recent window); the model's when None.
        calibration: what `calibrate` made for this model and policy, where something is learned.
            None: where only the transform learns, that of the built-in text, for models from
            `load_pretrained`: fitted once and kept in $DIFFKV_JAX_CACHE/calibrations under the
            model's fingerprint.
        strict: a policy whose mean KL on this model's built-in text is above 0.1 raises; False: it
            warns, once. That is measured at the first call with a policy and kept, for policies
            without numbers for each request. None, or 0 in $DIFFKV_JAX_CHECK_POLICIES: it is not.
        implementation: kernels: "xla", "cpu" (native), "triton" (GPU) or "mosaic_tpu" (TPU); None
            takes those of the platform at hand.
        interpret: run Pallas kernels in their interpreter, on any platform: slow, for tests.
    """

    policy: CompressionPolicy | FittedPolicy | AutoPolicy | str | None
    memory_budget: int | str | None
    max_len: int | None
    cache_dtype: str | None
    calibration: Calibration | None
    strict: bool | None
    implementation: str | None
    interpret: bool | Literal["checked"]


def check_options(
    options: Mapping[str, Any], fixed: str | None = None, caller: str = "generate"
) -> None:
    """Refuse names that are no `CacheOptions`, and all of them where the cache is `fixed`.

    Raises:
        TypeError: names them.
    """
    known = CacheOptions.__annotations__
    if unknown := [name for name in options if name not in known]:
        like = nearest(unknown, [*known, "max_new_tokens", "sampling", "prefill_chunk", "cache"])
        raise TypeError(f"{caller}() got unexpected keyword arguments {unknown}{like}")
    if fixed and options:
        raise WrongType(f"{' and '.join(options)} beside cache=: {fixed}; leave them out")


def cache_for(
    model: CausalLM,
    params: Any,
    totals: np.ndarray,
    longest: int,
    prefill_chunk: int,
    options: CacheOptions,
    *,
    fits_budget: bool = True,
) -> KVCache:
    """An empty cache for requests that come to `totals` int [R] tokens, their longest prompt to
    `longest`, which goes in chunks of `prefill_chunk`. With `fits_budget` a memory budget is the
    goal of a policy that is to be fitted, without it is but the size of the pool.

    Raises:
        TypeError, ValueError: bad input, named.
    """
    check_options(options)
    given: dict[str, Any] = {**options}
    interpret, implementation = given.pop("interpret", False), given.pop("implementation", None)
    interpret = interpret if interpret == "checked" else flag("interpret", interpret)
    strict = given.pop("strict", False)
    strict = None if strict is None else flag("strict", strict)
    policy, calibration = given.pop("policy", None), given.pop("calibration", None)
    if asks_for_fit(policy):
        Kernels.resolve(implementation, interpret=interpret)
        check_before_fit(model, totals, longest, prefill_chunk, **given)
    choice = chosen(
        model,
        params,
        policy,
        calibration,
        memory_budget=given.get("memory_budget") if fits_budget else None,
        context=given.get("max_len") or int(totals.max()),
        requests=len(totals),
    )
    policy, calibration = choice.policy, choice.calibration
    chunk_size(longest, prefill_chunk, policy.queries)
    kernels = kernels_for(policy, model.attention, implementation, interpret=interpret)
    cache = make_cache(model, policy, totals, kernels=kernels, calibration=calibration, **given)
    if not choice.measured:
        judge(model, params, policy, calibration, strict=strict, stacklevel=LINE)
    return cache


def check_before_fit(
    model: CausalLM,
    totals: np.ndarray,
    longest: int,
    prefill_chunk: int,
    *,
    max_len: int | None = None,
    memory_budget: int | str | None = None,
    cache_dtype: str | None = None,
) -> None:
    """Refuse at once what would be refused after a policy has been fitted, minutes later.

    Raises:
        TypeError, ValueError: bad input, named.
    """
    chunk_size(longest, prefill_chunk, diffkv().queries)
    if memory_budget is not None:
        parse_bytes(memory_budget)
    _spec_for(model.attention, CompressionPolicy.none(), totals, max_len, cache_dtype, None)


@in_32_bits
def make_cache(
    model: CausalLM,
    policy: CompressionPolicy | FittedPolicy | str | None,
    totals: Sequence[int] | np.ndarray,
    *,
    max_len: int | None = None,
    memory_budget: int | str | None = None,
    cache_dtype: str | None = None,
    kernels: Kernels | None = None,
    calibration: Calibration | None = None,
) -> KVCache:
    """An empty cache for requests that come to `totals` tokens each; `kernels` are those of the
    platform when None, the other arguments are those of `generate`.

    A calibration must be of the policy's tiers and transforms; that it is of these parameters only
    `generate` can check, which alone can make one too. Without `max_len` the totals are rounded up
    to multiples of 128, so that nearly equal prompts share their compiled programs.

    Raises:
        TypeError, ValueError: bad input, named; more than the model's context or the device's
            memory.
    """
    check_model("make_cache", model)
    check_outside_jit("make_cache", totals)
    if asks_for_fit(policy):
        rule = "a policy or a FittedPolicy: fit_policy(model, params) makes one"
        refuse("policy", policy, rule)
    if isinstance(policy, FittedPolicy):
        check_no_calibration(calibration)
        policy, calibration = policy.policy, policy.calibration
    policy, totals = as_policy(policy), _as_totals(totals)
    if calibration is not None:
        instance("calibration", calibration, Calibration, CALIBRATE)
    policy = as_calibrated(policy, calibration)
    spec, room = _spec_for(model.attention, policy, totals, max_len, cache_dtype, kernels)
    tables, transform = learned_for(spec, policy, calibration)
    policy = with_leaves(policy, transform=transform)
    if isinstance(policy.keep, Budget) and policy.keep.in_bytes:
        _check_one_budget(policy.keep, memory_budget)
        policy, memory_budget = kept_within(spec, policy, room), str(policy.keep.keep)
    spec = with_pool(spec, policy, list(totals), room, memory_budget)
    return _allocated(spec, bound(spec, policy), tables)


def _spec_for(
    attention: AttentionSpec,
    policy: CompressionPolicy,
    totals: Sequence[int] | np.ndarray,
    max_len: int | None,
    cache_dtype: str | None,
    kernels: Kernels | None,
) -> tuple[CacheSpec, list[int]]:
    """Of a cache that has no pages yet, and the tokens that each request may ever come to."""
    max_len = integer("max_len", max_len, least=1, most=None, optional=True)
    room = [-(-max(n, 1) // 128) * 128 if max_len is None else max_len for n in map(int, totals)]
    check_context(attention, np.asarray(totals), max(room))
    spec = CacheSpec.build(
        attention,
        policy,
        num_requests=len(totals),
        max_len=max(room),
        num_pages=0,
        dtype=dtype_name("cache_dtype", cache_dtype) or attention.dtype,
        kernels=kernels_for(policy, attention)
        if kernels is None
        else instance("kernels", kernels, Kernels, "Kernels.resolve(name)"),
    )
    check_room(attention, max_len, spec, policy)
    return spec, room


def _as_totals(given: Any) -> tuple[int, ...]:
    remedy = "a list with the tokens of each request"
    totals = tuple_of("totals", given, lambda name, n: integer(name, n, least=0, most=None), remedy)
    if not totals:
        refuse("totals", given, "a list with the tokens of at least one request")
    return totals


def dtype_name(name: str, dtype: Any) -> str | None:
    """ "bfloat16" from that or from `jnp.bfloat16` and its like; None stays.

    Raises:
        TypeError, ValueError: it is none that exact tokens can be kept in.
    """
    if dtype is not None and not isinstance(dtype, str):
        dtype = next((one for one in DTYPES if _is_dtype(dtype, one)), dtype)
    return one_of(name, dtype, DTYPES, optional=True)


def _is_dtype(given: Any, name: str) -> bool:
    try:
        return jnp.dtype(given) == name
    except Exception:  # whatever a foreign object raises
        return False


def check_room(
    attention: AttentionSpec, max_len: int | None, spec: CacheSpec, policy: CompressionPolicy
) -> None:
    """Refuse a cache for longer sequences than the model was made for.

    Raises:
        ValueError: names both lengths, and the bytes that the cache would take.
    """
    most = attention.max_position_embeddings
    if max_len is not None and max_len > most:
        nearly = bound(spec, with_leaves(policy, keep=KeepAll()))
        size = humanize.naturalsize(cache_bytes(spec, nearly), binary=True)
        raise ValueError(
            f"max_len={max_len} is more than the model's context of {most} tokens, and such a "
            f"cache would take {size} before its first "
            f"page: lower it to {most} at most"
        )


def _check_one_budget(keep: Budget, memory_budget: int | str | None) -> None:
    if memory_budget is not None:
        raise ValueError(
            f"keep={keep.keep!r} is a memory budget already: leave "
            f"memory_budget={memory_budget!r} out"
        )


_empty = jax.jit(empty_cache, static_argnames="spec")


def _allocated(spec: CacheSpec, policy: CompressionPolicy, tables: Any) -> KVCache:
    try:
        return jax.block_until_ready(_empty(spec, policy, tables))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = humanize.naturalsize(cache_bytes(spec, policy), binary=True)
        raise ValueError(
            f"a cache for {spec.num_requests} requests of up to {spec.max_len} tokens takes "
            f"{size}, more than the device has free: give a "
            "memory_budget, a smaller max_len or fewer requests"
        ) from error
